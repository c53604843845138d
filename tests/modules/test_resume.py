"""A run that was interrupted at a rollout boundary ends with the very weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rllava_pl.callbacks import RolloutCheckpoint
from rllava_pl.loop.options import KL, Batching, Schedule
from rllava_pl.models import LoRA
from rllava_pl.modules import CHORD, GRPO, PPO, RLOO, UFT, ClipCov, PolicyModule
from rllava_pl.modules.policy_module import STATE
from tests import runs


def fit(
    root: Path, *, rollouts: int, checkpoint: str | None = None, **options: object
) -> tuple[PolicyModule, RolloutCheckpoint]:
    callback = RolloutCheckpoint(str(root), every_n_rollouts=1, keep=0)
    module = runs.module(max_rollouts=5, **options)
    if rollouts < 5:
        module.on_train_batch_end = lambda *_: setattr(module.trainer, "should_stop", module.state.rollouts >= rollouts)
    trainer = runs.trainer(root, callbacks=[callback])
    data = runs.data(batch_size=4, train_size=13, demonstrations=0.5)  # 3 rollouts an epoch
    trainer.fit(module, data, ckpt_path=checkpoint)
    return module, callback


def counters(module: PolicyModule) -> dict[str, float]:
    return {name: x for name, x in module.state.as_dict().items() if name != "saved_at_ns"}


def state(module: PolicyModule) -> dict[str, torch.Tensor]:
    moments = module.optimizers().optimizer.state.values()
    flat = {f"moment{k}.{name}": x for k, s in enumerate(moments) for name, x in s.items()}
    flat |= {f"state.{k}": torch.tensor(x, dtype=torch.float64) for k, x in counters(module).items()}
    return {name: x.detach().clone() for name, x in module.state_dict().items()} | flat


CASES = {
    "KL in the loss": (GRPO, {"schedule": Schedule(kind="cosine")}),
    "KL in the reward, two epochs": (
        RLOO,
        {"kl": KL(reward_coef=0.01), "batching": Batching(num_minibatches=2, update_epochs=2)},
    ),
    "LoRA": (GRPO, {"policy": lambda: runs.tiny(lora=LoRA(r=4), freeze=["vision_tower"])}),
}
WITH_STATE = {
    "adaptive KL": (RLOO, {"kl": KL(reward_coef=0.01, target=0.001, horizon=100)}),
    "shared critic": (PPO, {"critic_warmup_steps": 3}),
    "separate critic": (PPO, {"critic": "separate"}),
    "schedule of μ": (CHORD, {"mu_warmup_steps": 2, "mu_decay_steps": 3}),
    "hints": (UFT, {"hint_steps": 4}),
    "drawn tokens": (ClipCov, {"ratio": 0.1, "lower": 0.0}),
    "micro-batches of three": (GRPO, {"batching": Batching(num_minibatches=2, micro_batch_size=3)}),
}
IN_AND_BETWEEN_EPOCHS = [
    pytest.param(*case, at, id=f"{at}-{name}")
    for name, case in CASES.items()
    for at in (1, 3, 4)  # inside an epoch, at its end, in the next
]


@pytest.mark.parametrize(
    ("algorithm", "options", "at"),
    [*IN_AND_BETWEEN_EPOCHS, *(pytest.param(*case, 2, id=name) for name, case in WITH_STATE.items())],
)
def test_resumed_run_is_bit_identical(
    tmp_path: Path, algorithm: type[PolicyModule], options: dict[str, object], at: int
) -> None:
    def chosen() -> dict[str, object]:
        return {name: value() if callable(value) else value for name, value in options.items()}

    whole, _ = fit(tmp_path / "whole", rollouts=5, algorithm=algorithm, **chosen())
    fit(tmp_path / "part", rollouts=at, algorithm=algorithm, **chosen())
    path = tmp_path / "part" / f"rollout-{at:06d}.ckpt"
    resumed, _ = fit(tmp_path / "rest", rollouts=5, algorithm=algorithm, checkpoint=str(path), **chosen())
    expected, got = state(whole), state(resumed)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert (whole.state.kl_factor != 1.0) == bool(isinstance(options.get("kl"), KL) and options["kl"].target)
    assert whole.state.rollouts == resumed.state.rollouts == 5
    assert whole.state.updates == resumed.state.updates == 5 * whole.batching.updates_per_rollout


def test_resumed_run_that_was_finished_does_nothing(tmp_path: Path) -> None:
    done, callback = fit(tmp_path / "a", rollouts=5)
    again, _ = fit(tmp_path / "b", rollouts=5, checkpoint=callback.last_path)
    assert again.state.rollouts == 5
    for name, tensor in done.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_checkpoint_holds_only_tensors_and_what_training_changed(tmp_path: Path) -> None:
    options = {"policy": runs.tiny(lora=LoRA(r=4))}
    _, callback = fit(tmp_path, rollouts=1, **options)
    checkpoint = torch.load(callback.last_path, weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names and all("lora_" in name for name in names)
    assert checkpoint[STATE]["state"]["rollouts"] == 1 and checkpoint[STATE]["state"]["updates"] == 2


def test_reference_is_not_in_the_checkpoint_and_is_loaded_at_resume(tmp_path: Path) -> None:
    module, callback = fit(tmp_path / "a", rollouts=2)
    assert not any(n.startswith("reference") for n in torch.load(callback.last_path, weights_only=True)["state_dict"])
    resumed, _ = fit(tmp_path / "b", rollouts=3, checkpoint=callback.last_path)
    for name, tensor in module.reference.state_dict().items():
        assert torch.equal(resumed.reference.state_dict()[name], tensor), name


def test_another_seed_is_refused_at_resume(tmp_path: Path) -> None:
    _, callback = fit(tmp_path / "a", rollouts=1)
    with pytest.raises(ValueError, match="the checkpoint was made with seed 1, this run has seed 2"):
        fit(tmp_path / "b", rollouts=2, checkpoint=callback.last_path, seed=2)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    callback = RolloutCheckpoint(str(tmp_path), every_n_rollouts=2, keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    runs.trainer(tmp_path, callbacks=[callback]).fit(runs.module(max_rollouts=5), runs.data())
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == ["notes.txt", "rollout-000004.ckpt", "rollout-000005.ckpt"]
