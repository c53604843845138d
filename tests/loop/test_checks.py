"""Options out of range, and those that contradict each other, are refused before anything is loaded."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from rllava_pl.loop.checks import Range
from rllava_pl.modules import CHORD, GRPO, HPT, LUFFY, PPO, ReMax
from tests import runs

WRONG = [
    (GRPO, {"group_size": 0}, "group_size is 0; it must be at least 1"),
    (GRPO, {"max_rollouts": -3}, "max_rollouts is -3; it must be at least 0"),
    (GRPO, {"micro_batch_size": -8}, "micro_batch_size is -8"),
    (GRPO, {"max_grad_norm": 0.0}, r"max_grad_norm is 0\.0; it must be larger than 0"),
    (GRPO, {"max_grad_norm": -1.0}, r"max_grad_norm is -1\.0"),
    (GRPO, {"clip_low": -0.2}, r"clip_low is -0\.2"),
    (GRPO, {"dual_clip": 0.5}, r"dual_clip is 0\.5; it must be larger than 1"),
    (GRPO, {"kl_loss_coef": -1.0}, r"kl_loss_coef is -1\.0"),
    (GRPO, {"kl_loss_coef": nan}, "kl_loss_coef is nan"),
    (GRPO, {"final_lr_ratio": 9.0}, r"final_lr_ratio is 9\.0; it must be at least 0 and at most 1"),
    (GRPO, {"engine_correction_cap": 0.0}, "engine_correction_cap"),
    (GRPO, {"val_samples": -1}, "val_samples"),
    (GRPO, {"kl_estimator": "k4"}, "kl_estimator is 'k4'; it must be one of 'k1'"),
    (GRPO, {"aggregation": "mean"}, "aggregation is 'mean'; it must be one of"),
    (GRPO, {"engine_correction": "foo"}, "engine_correction is 'foo'"),
    (PPO, {"critic": "sepearate"}, "critic is 'sepearate'; it must be one of 'shared', 'head', 'separate'"),
    (PPO, {"gamma": 1.5}, r"gamma is 1\.5; it must be at least 0 and at most 1"),
    (PPO, {"group_size": 1, "max_refills": 20}, "max_refills looks for groups whose rewards differ"),
    (CHORD, {"mu": 1.5}, r"mu is 1\.5"),
    (LUFFY, {"shaping": 0.0}, r"shaping is 0\.0; it must be larger than 0"),
    (
        GRPO,
        {"lr_schedule": "linear", "warmup_steps": 12, "max_rollouts": 3, "minibatches": 2, "epochs": 2},
        "max_rollouts 3 x minibatches 2 x epochs 2 = 12 steps",
    ),
]


@pytest.mark.parametrize(("algorithm", "options", "said"), WRONG)
def test_an_option_out_of_range_is_named(algorithm, options, said):
    with pytest.raises(ValueError, match=said):
        runs.module(algorithm, **options)


def test_no_clipping_and_no_end_are_in_range():
    assert runs.module(GRPO, max_grad_norm=inf, max_rollouts=0, clip_high=inf).max_grad_norm == inf


@pytest.mark.parametrize(
    ("value", "inside"), [(0, False), (1e-9, True), (2, True), (2.1, False), (nan, False), ("1", False)]
)
def test_a_range_without_its_lower_end(value, inside):
    assert (value in Range(0, 2, without_low=True)) is inside


@pytest.mark.parametrize(("algorithm", "fits", "refused"), [(GRPO, 4, 5), (ReMax, 4, 5), (CHORD, 5, 4), (HPT, 10, 8)])
def test_a_micro_batch_holds_whole_groups_with_what_stands_beside_them(algorithm, fits, refused):
    assert runs.module(algorithm, group_size=4, micro_batch_size=fits).micro_batch_size == fits
    with pytest.raises(ValueError, match="a group shares its prompt"):
        runs.module(algorithm, group_size=4, micro_batch_size=refused)


class Reduces(GRPO):
    def policy_loss(self, logp_NT, batch):
        return super().policy_loss(logp_NT, batch)[batch.mask_NT].sum()


class Misshapes(GRPO):
    def advantages(self, experience):
        return super().advantages(experience)[:-1]


class Forgets(GRPO):
    def advantages(self, experience):
        super().advantages(experience)


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        (Reduces, r"Reduces\.policy_loss returned shape \(\); it is the loss of every token, \(8, \d+\)"),
        (Misshapes, r"Misshapes\.advantages returned shape \(\d+,\); it is one number a sample, \(\d+,\), or a token"),
        (Forgets, r"Forgets\.advantages returned None"),
    ],
)
def test_what_an_algorithm_returns_in_a_wrong_shape_is_named(tmp_path, algorithm, said):
    """With a KL term a scalar would spread over all tokens, and the gradient depend on the micro-batches."""
    module = runs.module(algorithm, kl_loss_coef=0.04, micro_batch_size=8)
    with pytest.raises(ValueError, match=said):
        runs.trainer(tmp_path).fit(module, runs.data())
    assert torch.equal(module.updates_done, torch.tensor(0))
