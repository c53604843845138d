"""Given responses among, beside and in front of sampled ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from rllava_pl.functional.advantages import grpo
from rllava_pl.functional.demonstrations import chord_mu
from rllava_pl.loop.penalties import penalize
from rllava_pl.modules import CHORD, HPT, LUFFY, SRFT, UFT, RLModule
from rllava_pl.rewards import BaseReward, RewardRunner, Scoring
from rllava_pl.types import Credit, Prompt, PromptBatch, Rollout, Sampling, Score, ScoredBatch, TrainingBatch
from tests import runs
from tests.modules.passes import Ranked, fitted, gradient


def mixed_prompts() -> list[Prompt]:
    """Four prompts, of which the first and the third have a target."""
    data = runs.data(demonstrations=1.0)
    data.setup("fit")
    rows = [data.train_prompts[i] for i in range(4)]
    return [dataclasses.replace(row, target="") if p % 2 else row for p, row in enumerate(rows)]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[type[RLModule], RLModule]:
    return {a: fitted(tmp_path_factory.mktemp("run"), a) for a in (LUFFY, SRFT, HPT, CHORD, UFT)}


def scored(module: RLModule, reward: BaseReward | None = None) -> ScoredBatch:
    """Samples and demonstrations of the four prompts, scored by another reward if one is given."""
    runner = module.reward_runner
    if reward is not None:
        module.reward_runner = RewardRunner([reward], Scoring(isolation="none"))
    batch = module.score(module.sample(PromptBatch(mixed_prompts())))
    module.reward_runner = runner
    return batch


def trained(module: RLModule, reward: BaseReward | None = None) -> TrainingBatch:
    return module.compute_advantages(module.compute_logprobs(scored(module, reward)))


class OneRight(BaseReward):
    """The first ``right`` samples of a group earn 1, its others 0, demonstrations 1."""

    components = ("accuracy",)

    def __init__(self, right: dict[str, int]) -> None:
        super().__init__()
        self.right = right

    def score(self, rollout: Rollout) -> Score:
        raise NotImplementedError  # a sample's number is known to the batch alone

    def __call__(self, rollouts: list[Rollout]) -> list[Score]:
        seen: dict[str, int] = {}
        values = []
        for rollout in rollouts:
            number = seen[rollout.prompt.uid] = seen.get(rollout.prompt.uid, -1) + 1
            given = not rollout.sampled_mask.any()
            values.append(float(given or number < self.right.get(rollout.prompt.uid, 0)))
        return [Score(value, {"accuracy": value}) for value in values]


# -- one of the group --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [LUFFY, SRFT])
def test_mixed_group_has_a_demonstration_in_place_of_a_sample(
    modules: dict[type[RLModule], RLModule], algorithm: type[RLModule]
) -> None:
    batch = scored(modules[algorithm])
    given_PG = batch.given_mask_NT.any(1).unflatten(0, (4, 4)).tolist()
    assert given_PG == [[False, False, False, True], [False] * 4] * 2
    for row in (3, 11):
        rollout = batch.rollouts[row]
        policy = modules[algorithm].policy
        assert rollout.text == rollout.prompt.target and rollout.response_ids[-1] in policy.stop_ids
        assert torch.equal(batch.given_mask_NT[row], batch.trained_mask_NT[row])
    assert len({tuple(r.response_ids.tolist()) for r in batch.rollouts[4:8]}) > 1  # four samples of their own


def test_seven_samples_and_one_demonstration_is_the_papers_group() -> None:
    module = runs.module(LUFFY, group_size=8)
    module.configure_model()
    asked: list[int] = []
    module.engine = SimpleNamespace(generate=lambda requests, _: asked.extend(len(r.seeds) for r in requests) or [])
    module.sample(PromptBatch(mixed_prompts()))
    assert asked == [7, 8, 7, 8]


def test_demonstration_in_the_group_is_scored_and_part_of_the_mean(modules: dict[type[RLModule], RLModule]) -> None:
    """Samples 1, 0, 0 and the demonstration 1: mean 0.5 instead of 1/3."""
    module = modules[LUFFY]
    credited = trained(module, OneRight({prompt.uid: 1 for prompt in mixed_prompts()}))
    assert credited.advantages_NT[:4, 0].tolist() == [0.5, -0.5, -0.5, 0.5]


# -- beside the group --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [HPT, CHORD])
def test_demonstration_beside_the_group_is_not_part_of_the_mean(
    modules: dict[type[RLModule], RLModule], algorithm: type[RLModule]
) -> None:
    module = modules[algorithm]
    batch = scored(module)
    assert len(batch) == 20 and batch.group_size == 5
    assert batch.given_mask_NT.any(1).nonzero()[:, 0].tolist() == [4, 14]
    assert batch.trained_mask_NT.any(1).unflatten(0, (4, 5))[:, 4].tolist() == [
        True,
        False,
        True,
        False,
    ]  # rows that are not trained
    returned = module.advantages(penalize(batch, None, kl_coef=0.0))
    advantages_N = returned.advantages if isinstance(returned, Credit) else returned
    samples = [n for n in range(20) if n % 5 < 4]
    expected_N = grpo(batch.scores_N[samples], batch.group_N[samples], scale_by_std=algorithm is CHORD)
    torch.testing.assert_close(advantages_N[samples], expected_N)
    assert (advantages_N[4::5] == 0).all() and not batch.in_baseline_N[4::5].any()


@pytest.mark.parametrize(("gate", "imitated"), [(0, [True, False, False, False]), (2, [True, False, True, False])])
def test_hpt_imitates_where_samples_fail_and_explores_elsewhere(
    modules: dict[type[RLModule], RLModule], gate: int, imitated: list[bool]
) -> None:
    """Right samples: none, none, two and three of four; the second and the fourth prompt have no demonstration."""
    module, rows = modules[HPT], mixed_prompts()
    module.gate = gate
    module.metrics.clear()
    credited = trained(module, OneRight({rows[2].uid: 2, rows[3].uid: 3}))
    module.gate = 0
    trained_PG = credited.trained_mask_NT.any(1).unflatten(0, (4, 5)).tolist()
    assert trained_PG == [[False] * 4 + [True] if copied else [True] * 4 + [False] for copied in imitated]
    assert module.metrics.means()["imitated_prompts"] == sum(imitated) / 4
    assert torch.equal(credited.given_mask_NT.any(1), credited.trained_mask_NT.any(1) & (torch.arange(20) % 5 == 4))


def test_gated_rows_count_in_no_denominator(modules: dict[type[RLModule], RLModule]) -> None:
    """Prompt 0 imitates: 12 rows of samples are left, x 8 tokens of budget."""
    module, rows = modules[HPT], mixed_prompts()
    batch = trained(module, OneRight({row.uid: 1 for row in rows[1:]}))
    counts = module.updater.denominators(module.terms(batch))
    length = len(module.policy.encode_response(rows[0].target))
    assert (float(counts["policy"]), float(counts["imitation"])) == (12 * 8, length)


def test_weight_of_a_demonstration_does_not_depend_on_the_number_of_samples(
    modules: dict[type[RLModule], RLModule],
) -> None:
    """CHORD with μ = 1 is the mean over demonstration tokens, whatever the samples do."""
    module = modules[CHORD]
    mu, module.mu = module.mu, 1.0
    batch = trained(module)
    whole = gradient(module, batch)
    alone = gradient(module, batch.select([0, 1, 2, 3], [0, 4]))
    module.mu = mu
    assert whole.norm() > 0 and (whole - alone).norm() <= 1e-5 * whole.norm()


def test_mu_rises_and_falls_with_the_rollouts(modules: dict[type[RLModule], RLModule]) -> None:
    constant = modules[CHORD]
    scheduled = runs.module(CHORD, mu=0.5, mu_warmup_steps=200, mu_decay_steps=400, mu_valley=0.02)
    phases = {"warmup_steps": 200, "decay_steps": 400, "peak": 0.5, "valley": 0.02}
    for step, mu in ((0, 0.0), (100, 0.25), (200, 0.5), (400, 0.26), (600, 0.02), (900, 0.02)):
        scheduled.state.rollouts = step
        assert scheduled.current_mu == pytest.approx(mu) == chord_mu(step, **phases)
    assert constant.current_mu == 0.1


# -- in front of the samples -------------------------------------------------------------------------------------------


class Hints(Callback):
    """``train/hint_fraction`` of every rollout, and what was trained on."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.batches: list[ScoredBatch] = []

    def setup(self, trainer, pl_module, stage) -> None:
        advantages = pl_module.compute_advantages
        pl_module.compute_advantages = lambda batch: (self.batches.append(batch), advantages(batch))[1]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.fractions.append(float(trainer.callback_metrics["train/hint_fraction"]))


def test_hints_fade_and_end(tmp_path: Path) -> None:
    hints, module = Hints(), runs.module(UFT, hint_steps=3, max_rollouts=5)
    runs.trainer(tmp_path, callbacks=[hints]).fit(module, runs.data(demonstrations=1.0))
    assert all(fraction > 0 for fraction in hints.fractions[:2])
    assert hints.fractions[3:] == [0.0, 0.0]
    for batch in hints.batches:
        for p in range(4):
            group = batch.rollouts[4 * p : 4 * p + 4]
            given = [int(batch.given_mask_NT[4 * p + g].sum()) for g in range(4)]
            assert len(set(given)) == 1  # one hint for all samples of a prompt
            target = module.policy.encode_response(group[0].prompt.target)
            for rollout in group:
                assert torch.equal(rollout.response_ids[: given[0]], target[: given[0]])
                assert given[0] < len(target)  # the end token is never given
    assert any(batch.given_mask_NT.any() for batch in hints.batches)


def test_hint_tokens_are_demonstration_tokens_at_the_front(modules: dict[type[RLModule], RLModule]) -> None:
    module = modules[UFT]
    batch = scored(module)
    given_N = batch.given_mask_NT.sum(1).unflatten(0, (4, 4))
    assert (given_N[1] == 0).all() and (given_N[3] == 0).all()  # prompts without target
    assert given_N.sum() > 0
    columns_T = torch.arange(batch.trained_mask_NT.shape[1])
    assert torch.equal(batch.given_mask_NT, columns_T < given_N.flatten()[:, None])


def test_number_of_hint_segments_is_drawn_from_the_binomial_of_the_step(
    modules: dict[type[RLModule], RLModule],
) -> None:
    """At rollout 0 of 300 p is 0.95, at 299 it is 0.05: of 200 prompts, nearly all segments, and nearly none."""
    module = modules[UFT]
    (request,) = module.requests(mixed_prompts()[:1], samples=4, stream="train")
    whole = len(module.policy.encode_response(request.prompt.target)) - 1
    done = module.state.rollouts
    for step, low, high in ((0, 0.9, 1.0), (299, 0.0, 0.1), (300, 0.0, 0.0)):
        module.state.rollouts = step
        rows = [dataclasses.replace(request.prompt, uid=str(k)) for k in range(200)]
        lengths = [len(module.hint(dataclasses.replace(request, prompt=row))) for row in rows]
        assert low <= sum(lengths) / (200 * whole) <= high
    module.state.rollouts = done


# -- what cannot be given ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [LUFFY, HPT, UFT])
def test_target_that_does_not_fit_the_budget_is_refused(
    modules: dict[type[RLModule], RLModule], algorithm: type[RLModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = modules[algorithm]
    monkeypatch.setattr(module, "sampling", Sampling(max_tokens=2))
    row = mixed_prompts()[0]
    message = rf"target of prompt '{row.uid}' \({row.source}\): it has \d+ tokens, sampling.max_tokens is 2"
    with pytest.raises(ValueError, match=message):
        module.sample(PromptBatch([row]))


@pytest.mark.parametrize("algorithm", [LUFFY, HPT, UFT])
def test_target_with_an_image_token_is_refused(
    modules: dict[type[RLModule], RLModule], algorithm: type[RLModule]
) -> None:
    module, row = modules[algorithm], mixed_prompts()[0]
    image = module.policy.tokenizer.convert_ids_to_tokens(module.policy.banned_ids[0])
    row = dataclasses.replace(row, target=f"<answer>{image}</answer>", source="rows.jsonl:7")
    message = rf"target of prompt '{row.uid}' \(rows.jsonl:7\): .* holds the token '{image}', which stands for image"
    with pytest.raises(ValueError, match=message):
        module.sample(PromptBatch([row]))


@pytest.mark.parametrize("algorithm", [LUFFY, SRFT, HPT, CHORD, UFT])
def test_algorithm_trains_without_any_target(tmp_path: Path, algorithm: type[RLModule]) -> None:
    module = runs.module(algorithm, max_rollouts=1, rewards=[Ranked()])
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data(demonstrations=0.0))
    assert module.state.updates == 2 and trainer.callback_metrics["train/grad_norm"] > 0
    assert trainer.callback_metrics[f"train/{module.given_metric}"] == 0
