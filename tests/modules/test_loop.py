"""One pass of the loop: order of stages, what is trained on, and that nothing changes the gradient that should not."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from rllava_pl.loop.experience import assemble, minibatches
from rllava_pl.modules import GRPO, RLOO, RLModule
from rllava_pl.rewards import AnswerTagReward, BaseReward
from rllava_pl.rewards.output import judge
from rllava_pl.types import Experience, PromptBatch, Rollout, Sampling, Score
from tests import runs
from tests.modules.passes import assert_close, gradient


@pytest.fixture(scope="module")
def pass_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, Experience]:
    """A module that was fitted for one pass, and the experience of another."""
    module = runs.module(max_rollouts=1)
    runs.trainer(tmp_path_factory.mktemp("run")).fit(module, runs.data())
    data = runs.data()
    data.setup("fit")
    prompts = PromptBatch(data.train_prompts[i] for i in range(4))
    experience = module.credit(module.evaluate(module.judge(module.rollout(prompts))))
    generator = torch.Generator().manual_seed(0)
    drift = 0.3 * torch.randn(experience.mask_NT.shape, generator=generator)  # as if the policy had moved since
    return module, experience.replace(
        old_logp_NT=experience.old_logp_NT + drift,
        advantages_NT=torch.randn(len(experience), 1, generator=generator).expand_as(drift) * experience.mask_NT,
    )


AGGREGATIONS = ["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_do_not_change_the_gradient(pass_of: tuple[RLModule, Experience], aggregation: str) -> None:
    module, experience = pass_of
    module.aggregation, module.entropy_coef = aggregation, 0.01
    whole = gradient(module, experience)
    for size in (1, 2, 4, 8):  # parts of a group, a group, two groups
        assert_close(gradient(module, experience, size), whole)


def test_the_order_of_samples_does_not_change_the_gradient(pass_of: tuple[RLModule, Experience]) -> None:
    module, experience = pass_of
    whole = gradient(module, experience)
    assert_close(gradient(module, experience.select([3, 1, 0, 2], [1, 3, 2, 0])), whole)


def test_minibatches_partition_the_prompts(pass_of: tuple[RLModule, Experience]) -> None:
    _, experience = pass_of
    parts = minibatches(experience, 2, [2, 0, 3, 1])
    assert [[r.prompt.uid for r in part.rollouts[::4]] for part in parts] == [
        [experience.rollouts[4 * p].prompt.uid for p in pair] for pair in ([2, 0], [3, 1])
    ]


def test_every_rank_makes_the_same_number_of_updates_when_groups_were_dropped(
    pass_of: tuple[RLModule, Experience],
) -> None:
    _, experience = pass_of
    parts = minibatches(experience.select([1]), 2, [0])
    assert len(parts) == 2
    assert parts[0].mask_NT.any() and not parts[1].mask_NT.any()


class Picky(BaseReward):
    """Cannot score some prompts; the others get their sample's number."""

    def __init__(self, unscorable: set[str]) -> None:
        super().__init__()
        self.unscorable = unscorable

    def score(self, rollout: Rollout) -> Score:
        if rollout.prompt.uid in self.unscorable:
            return Score(None, reason="no_label")
        return Score(1.0)


def test_a_group_with_an_unscored_sample_is_dropped_whole(pass_of: tuple[RLModule, Experience]) -> None:
    _, experience = pass_of
    lost = experience.rollouts[4].prompt.uid
    rollouts = list(experience.rollouts)
    rewards = [Picky({lost})]
    kept = assemble(rollouts, judge(rewards, rollouts), 4, torch.device("cpu"))
    assert len(kept) == 12 and lost not in {r.prompt.uid for r in kept.rollouts}
    assert kept.rewards_N.isfinite().all()
    everyone = {r.prompt.uid for r in rollouts}
    nothing = assemble(rollouts, judge([Picky(everyone)], rollouts), 4, torch.device("cpu"))
    assert len(nothing) == 4 and not nothing.mask_NT.any() and nothing.rewards_N.isfinite().all()


def test_a_pass_in_which_nothing_was_scored_leaves_the_weights_alone(tmp_path: Path) -> None:
    class Never(BaseReward):
        def score(self, rollout: Rollout) -> Score:
            return Score(None, reason="no_label")

    module = runs.module(max_rollouts=1)
    module.rewards = [Never()]
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data())
    assert module.weight_version == 0 and module.rollout_index == 1
    assert trainer.callback_metrics["train/unscored_samples"] == 16


STAGES = ("rollout", "judge", "evaluate", "credit", "minibatches", "update", "report")


def test_the_stages_run_in_order_and_the_engine_is_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def record(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def wrapper(self: RLModule, *args: object) -> object:
            events.append(name)
            return original(self, *args)

        return wrapper

    class Hooks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            events.append("batch start")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            engine = pl_module.engine.engine.version
            events.append(f"batch end, engine at {engine}, policy at {pl_module.weight_version}")

    for name in STAGES:
        monkeypatch.setattr(RLModule, name, record(name, getattr(RLModule, name)))
    runs.trainer(tmp_path, callbacks=[Hooks()]).fit(runs.module(max_rollouts=2), runs.data())
    passes = ["batch start", "rollout", "judge", "evaluate", "credit", "minibatches", "update", "update", "report"]
    assert events == [
        *passes,
        "batch end, engine at 0, policy at 2",
        *passes,
        "batch end, engine at 2, policy at 4",
    ]


def test_metrics_have_the_documented_names(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, limit_val_batches=1, check_val_every_n_epoch=None, val_check_interval=1)
    trainer.fit(runs.module(max_rollouts=1, val_samples=2), runs.data())
    names = set(trainer.callback_metrics)
    for name in ("reward", "reward/accuracy", "reward/format", "kl", "entropy", "clip_fraction", "grad_norm"):
        assert f"train/{name}" in names
    for name in ("engine_mismatch_kl", "response_tokens", "truncated_fraction", "informative_groups", "loss"):
        assert f"train/{name}" in names
    assert {f"time/{phase}_seconds" for phase in ("rollout", "reward", "evaluate", "update")} <= names
    assert {"val/accuracy", "val/reward", "val/accuracy_sampled"} <= names
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())


def test_the_first_ratio_is_one_and_the_reference_is_the_start(tmp_path: Path) -> None:
    """One update a rollout: the policy updated is the one that sampled, so nothing clips and KL to itself is 0."""
    trainer = runs.trainer(tmp_path)
    trainer.fit(runs.module(max_rollouts=1, minibatches=1), runs.data())
    assert trainer.callback_metrics["train/clip_fraction"] == 0
    assert trainer.callback_metrics["train/kl"].abs() < 1e-6
    assert trainer.callback_metrics["train/engine_mismatch_kl"].abs() < 1e-8


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        module = runs.module(max_rollouts=2, seed=seed, policy=runs.tiny())
        module.source.prepare = lambda _: runs.TinyVLM.prepare(module.source, 1)  # the same model for both
        runs.trainer(tmp_path).fit(module, runs.data())
        return {name: p.detach().clone() for name, p in module.policy.named_parameters()}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


BAD = {
    "no reward": ({"rewards": []}, "no reward given"),
    "group of one": ({"group_size": 1}, "group_size must be >= 2, is 1"),
    "micro-batch": ({"micro_batch_size": 6}, r"micro_batch_size 6 and group_size 4: .* \(a multiple of 4\)"),
    "decay": ({"lr_schedule": "linear", "max_rollouts": 0}, "'linear' decays over max_rollouts, which is 0"),
    "minibatches": ({"minibatches": 0}, "minibatches is 0; it must be at least 1"),
    "greedy": ({"sampling": Sampling(temperature=0.0)}, "temperature is 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("algorithm", [GRPO, RLOO])
def test_contradicting_options_are_refused(algorithm: type[RLModule], options: dict[str, object], message: str) -> None:
    arguments = {"rewards": [AnswerTagReward()], "group_size": 4} | options
    with pytest.raises(ValueError, match=message):
        algorithm(runs.tiny(), **arguments)


def test_truncated_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_p=0.9, top_k=0: truncated sampling draws from another distribution"):
        Sampling(top_p=0.9)
    with pytest.raises(ValueError, match=r"max_tokens is 0"):
        Sampling(max_tokens=0)


def test_a_batch_that_does_not_divide_is_refused_before_the_first_rollout(tmp_path: Path) -> None:
    module = runs.module(minibatches=3)
    with pytest.raises(ValueError, match=r"4 prompts x group_size 4 = 16 samples cannot be split into 3 mini"):
        runs.trainer(tmp_path).fit(module, runs.data())
    assert module.rollout_index == 0


def test_experience_is_immutable(pass_of: tuple[RLModule, Experience]) -> None:
    _, experience = pass_of
    with pytest.raises(dataclasses.FrozenInstanceError):
        experience.group_size = 2  # type: ignore[misc]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_recomputes_old_log_probs_in_the_trainers_arithmetic(tmp_path: Path, precision: str) -> None:
    """Sampling and scoring take different forms, which differ by rounding in bf16; ratios must still start at 1."""
    module = runs.module(max_rollouts=1)
    trainer = runs.trainer(tmp_path, precision=precision)
    trainer.fit(module, runs.data())
    assert module.weight_version == 2
    assert 0 <= trainer.callback_metrics["train/engine_mismatch_kl"] < 0.01
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())


def test_every_rollout_is_logged_whatever_log_every_n_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = runs.trainer(tmp_path, logger=logger)  # Lightning's default is every 50th step
    trainer.fit(runs.module(max_rollouts=3), runs.data())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/reward"]] == ["0", "1", "2"]
    assert trainer.logged_metrics["train/reward"] == trainer.callback_metrics["train/reward"]


def test_callbacks_can_monitor_what_a_rollout_measured(tmp_path: Path) -> None:
    stop = EarlyStopping("train/reward/format", mode="max", stopping_threshold=0.0, check_on_train_epoch_end=True)
    module = runs.module(max_rollouts=20)
    runs.trainer(tmp_path, callbacks=[stop]).fit(module, runs.data())
    assert module.rollout_index == 6  # one epoch of 24 prompts in batches of 4
