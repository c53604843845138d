"""One pass of the loop: order of stages, what is trained on, and what must not change the gradient."""

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

from rllava_pl.loop.batch import assemble, split_minibatches
from rllava_pl.loop.options import KL, Batching, Evaluation, Schedule
from rllava_pl.loop.updater import Updater
from rllava_pl.modules import GRPO, RLOO, RLModule
from rllava_pl.rewards import AnswerTagReward, BaseReward, compute_rewards
from rllava_pl.types import MissingTensorError, Rollout, Sampling, Score, TrainingBatch
from tests import runs
from tests.modules.cases import scored
from tests.modules.passes import Ranked, assert_close, gradient, prompts, scored_pass


@pytest.fixture(scope="module")
def pass_of(tmp_path_factory: pytest.TempPathFactory) -> tuple[RLModule, TrainingBatch]:
    """A module that was fitted for one pass, and the batch of another."""
    module = runs.module(max_rollouts=1)
    runs.trainer(tmp_path_factory.mktemp("run")).fit(module, runs.data())
    batch = module.compute_advantages(scored_pass(module, prompts(GRPO, 4)))
    generator = torch.Generator().manual_seed(0)
    drift = 0.3 * torch.randn(batch.trained_mask_NT.shape, generator=generator)  # as if the policy had moved since
    advantages_NT = torch.randn(len(batch), 1, generator=generator).expand_as(drift) * batch.trained_mask_NT
    return module, batch.replace(advantages_NT=advantages_NT).with_computed(old_logp_NT=batch.old_logp_NT + drift)


AGGREGATIONS = ["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_does_not_depend_on_micro_batches(
    pass_of: tuple[RLModule, TrainingBatch], monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    module, batch = pass_of
    monkeypatch.setattr(module, "aggregation", aggregation)
    monkeypatch.setattr(module, "entropy_coef", 0.01)
    whole = gradient(module, batch)
    for size in (1, 2, 3, 4, 8):  # parts of a group, a group, two groups
        assert_close(gradient(module, batch, size), whole)


def test_gradient_does_not_depend_on_the_order_of_samples(pass_of: tuple[RLModule, TrainingBatch]) -> None:
    module, batch = pass_of
    whole = gradient(module, batch)
    assert_close(gradient(module, batch.select([3, 1, 0, 2], [1, 3, 2, 0])), whole)


def test_minibatches_partition_the_prompts(pass_of: tuple[RLModule, TrainingBatch]) -> None:
    _, batch = pass_of
    parts = split_minibatches(batch, 2, [2, 0, 3, 1])
    assert [[r.prompt.uid for r in part.rollouts[::4]] for part in parts] == [
        [batch.rollouts[4 * p].prompt.uid for p in pair] for pair in ([2, 0], [3, 1])
    ]


def test_order_of_minibatches_is_a_function_of_seed_rollout_and_epoch(pass_of: tuple[RLModule, TrainingBatch]) -> None:
    _, batch = pass_of

    def orders(rollout: int, seed: int = 1) -> list[list[str]]:
        other = runs.module(seed=seed, batching=Batching(num_minibatches=2, update_epochs=2))
        other.state.rollouts = rollout
        return [[r.prompt.uid for r in part.rollouts[::4]] for part in other.minibatches(batch)]

    first = orders(rollout=0)
    assert len(first) == 4 and first == orders(rollout=0)
    for epoch in (first[:2], first[2:]):
        assert sorted(uid for part in epoch for uid in part) == sorted(r.prompt.uid for r in batch.rollouts[::4])
    assert len({str(orders(rollout, seed)) for rollout in range(4) for seed in (1, 2)}) > 1


def test_every_rank_makes_the_same_number_of_updates_when_groups_were_dropped(
    pass_of: tuple[RLModule, TrainingBatch],
) -> None:
    _, batch = pass_of
    parts = split_minibatches(batch.select([1]), 2, [0])
    assert len(parts) == 2
    assert parts[0].trained_mask_NT.any() and not parts[1].trained_mask_NT.any()


class Picky(BaseReward):
    """Cannot score some prompts; the others get 1."""

    def __init__(self, unscorable: set[str]) -> None:
        super().__init__()
        self.unscorable = unscorable

    def score(self, rollout: Rollout) -> Score:
        if rollout.prompt.uid in self.unscorable:
            return Score(None, reason="no_label")
        return Score(1.0)


def test_group_with_an_unscored_sample_is_dropped_whole() -> None:
    rollouts = list(scored([[1, 0, 0, 1]] * 4).rollouts)
    kept = assemble(rollouts, compute_rewards([Picky({"b"})], rollouts), 4, torch.device("cpu"))
    assert len(kept) == 12 and "b" not in {r.prompt.uid for r in kept.rollouts}
    assert kept.scores_N.isfinite().all()
    nothing = assemble(rollouts, compute_rewards([Picky(set("abcd"))], rollouts), 4, torch.device("cpu"))
    assert len(nothing) == 4 and not nothing.trained_mask_NT.any() and nothing.scores_N.isfinite().all()


def test_pass_in_which_nothing_was_scored_leaves_the_weights_unchanged(tmp_path: Path) -> None:
    class Never(BaseReward):
        def score(self, rollout: Rollout) -> Score:
            return Score(None, reason="no_label")

    module = runs.module(max_rollouts=1, rewards=[Never()])
    trainer = runs.trainer(tmp_path)
    trainer.fit(module, runs.data())
    assert module.state.updates == 0 and module.state.rollouts == 1
    assert trainer.callback_metrics["train/unscored_samples"] == 16


STAGES = {
    RLModule: ("sample", "score", "compute_logprobs", "compute_advantages", "minibatches", "log_rollout"),
    Updater: ("step",),
}


def test_stages_run_in_order_and_the_engine_has_the_weights_of_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def record(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def wrapper(self: object, *args: object) -> object:
            events.append(name)
            return original(self, *args)

        return wrapper

    class Hooks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            events.append("batch start")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            engine = pl_module.engine.engine.version
            events.append(f"batch end, engine at {engine}, policy at {pl_module.state.updates}")

    for owner, names in STAGES.items():
        for name in names:
            monkeypatch.setattr(owner, name, record(name, getattr(owner, name)))
    runs.trainer(tmp_path, callbacks=[Hooks()]).fit(runs.module(max_rollouts=2), runs.data())
    stages = ["sample", "score", "compute_logprobs", "compute_advantages", "minibatches", "step", "step", "log_rollout"]
    assert events == [
        "batch start",
        *stages,
        "batch end, engine at 0, policy at 2",
        "batch start",
        *stages,
        "batch end, engine at 2, policy at 4",
    ]


def test_observers_see_the_phases_of_a_pass_and_their_seconds_are_logged(tmp_path: Path) -> None:
    class Observer(Callback):
        def __init__(self) -> None:
            self.names: list[str] = []

        def setup(self, trainer, pl_module, stage) -> None:
            pl_module.phases.observers.append(self)

        def phase_begins(self, name: str) -> None:
            self.names.append(name)

        def phase_ends(self, name: str, seconds: float) -> None:
            self.names.append(f"/{name}")

    observer = Observer()
    trainer = runs.trainer(tmp_path, callbacks=[observer])
    trainer.fit(runs.module(max_rollouts=1), runs.data())
    assert " ".join(observer.names) == (
        "rollout sync /sync /rollout reward /reward logprobs /logprobs update /update update /update"
    )
    phases = {name for name in observer.names if name[0] != "/"}
    assert {f"time/{name}_seconds" for name in phases} <= trainer.callback_metrics.keys()


def test_metrics_have_the_documented_names(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path, limit_val_batches=1, check_val_every_n_epoch=None, val_check_interval=1)
    trainer.fit(runs.module(max_rollouts=1, evaluation=Evaluation(samples=2)), runs.data())
    names = set(trainer.callback_metrics)
    for name in ("reward", "reward_accuracy", "reward_format", "kl", "entropy", "clip_fraction", "grad_norm"):
        assert f"train/{name}" in names
    for name in ("clip_fraction_high", "clip_fraction_low", "loss", "policy_loss", "kl_loss"):
        assert f"train/{name}" in names
    for name in ("engine_mismatch_kl", "response_tokens", "truncated_fraction", "informative_groups"):
        assert f"train/{name}" in names
    assert {f"time/{phase}_seconds" for phase in ("rollout", "reward", "logprobs", "update")} <= names
    assert {"val/accuracy", "val/reward", "val/accuracy_sampled"} <= names
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")]


def test_loss_is_the_weighted_sum_of_its_terms(tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path)
    options = {"kl": KL(loss_coef=0.5), "entropy_coef": 0.01, "rewards": [Ranked()]}
    trainer.fit(runs.module(max_rollouts=2, **options), runs.data())
    policy, kl, entropy, loss = (
        float(trainer.callback_metrics[f"train/{name}"]) for name in ("policy_loss", "kl_loss", "entropy_loss", "loss")
    )
    assert loss == pytest.approx(policy + 0.5 * kl + 0.01 * entropy, rel=1e-4, abs=1e-7)
    assert entropy < 0 < kl


def test_first_ratio_is_one_and_the_reference_is_the_start(tmp_path: Path) -> None:
    """One update a rollout: the policy updated is the one that sampled, so nothing clips and KL to itself is 0."""
    trainer = runs.trainer(tmp_path)
    trainer.fit(runs.module(max_rollouts=1, batching=Batching()), runs.data())
    assert trainer.callback_metrics["train/clip_fraction"] == 0
    assert trainer.callback_metrics["train/kl"].abs() < 1e-6
    assert trainer.callback_metrics["train/engine_mismatch_kl"].abs() < 1e-8


def test_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    class SameModel(runs.TinyVLM):
        def prepare(self, seed: int) -> None:
            super().prepare(1)

    def weights(seed: int) -> dict[str, torch.Tensor]:
        tiny = runs.tiny()
        policy = SameModel(
            questions=tiny.questions, answers=tiny.answers, warmup_steps=tiny.warmup_steps, cache_dir=str(runs.CACHE)
        )
        module = runs.module(max_rollouts=2, seed=seed, policy=policy, rewards=[Ranked()])
        runs.trainer(tmp_path).fit(module, runs.data())
        return {name: p.detach().clone() for name, p in module.policy.named_parameters()}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


BAD = {
    "no reward": ({"rewards": []}, "no reward given"),
    "group of one": ({"group_size": 1}, "group_size must be >= 2, is 1"),
    "decay": ({"schedule": Schedule(kind="linear")}, "'linear' decays over max_rollouts, which is 0"),
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


def test_batch_that_does_not_divide_is_refused_before_the_first_rollout(tmp_path: Path) -> None:
    module = runs.module(batching=Batching(num_minibatches=3))
    with pytest.raises(ValueError, match=r"4 prompts x group_size 4 = 16 samples cannot be split into 3 mini"):
        runs.trainer(tmp_path).fit(module, runs.data())
    assert module.state.rollouts == 0


def test_batches_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored([[1, 0]]).group_size = 2  # type: ignore[misc]


def test_tensor_that_nothing_has_computed_is_named_with_its_source() -> None:
    with pytest.raises(MissingTensorError, match=r"this batch has no ref_logp_NT; set kl.loss_coef or kl.reward_coef"):
        _ = scored([[1, 0]]).ref_logp_NT


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_recomputes_old_log_probs_in_the_trainers_arithmetic(tmp_path: Path, precision: str) -> None:
    """Sampling and scoring take different forms, which differ by rounding in bf16; ratios must still start at 1."""
    module = runs.module(max_rollouts=1, rewards=[Ranked()])
    trainer = runs.trainer(tmp_path, precision=precision)
    trainer.fit(module, runs.data())
    assert module.state.updates == 2
    assert 0 <= trainer.callback_metrics["train/engine_mismatch_kl"] < 0.01
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())


def test_every_rollout_is_logged_whatever_log_every_n_steps(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = runs.trainer(tmp_path, logger=logger)  # Lightning's default is every 50th step
    trainer.fit(runs.module(max_rollouts=3), runs.data())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/reward"]] == ["0", "1", "2"]
    assert trainer.logged_metrics["train/reward"] == trainer.callback_metrics["train/reward"]


def test_callbacks_can_monitor_metrics_of_a_rollout(tmp_path: Path) -> None:
    stop = EarlyStopping("train/reward_format", mode="max", stopping_threshold=-1.0, check_on_train_epoch_end=True)
    module = runs.module(max_rollouts=20)
    runs.trainer(tmp_path, callbacks=[stop]).fit(module, runs.data())
    assert module.state.rollouts == 6  # one epoch of 24 prompts in batches of 4
