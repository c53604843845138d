"""Learning-rate factors."""

from __future__ import annotations

import math

import pytest

from rllava_pl.functional.schedules import lr_factor


def factors(count, **options):
    return [lr_factor(step, **options) for step in range(count)]


def test_warm_up_is_positive_from_the_first_step_and_ends_at_one():
    assert factors(6, schedule="constant", warmup_steps=4, total_steps=0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(3, schedule="constant", warmup_steps=0, total_steps=0) == [1.0, 1.0, 1.0]


def test_linear_decay_ends_at_the_final_ratio():
    # from 1 at step 1 to 0.2 at step 5 in four equal parts of 0.2
    actual = factors(8, schedule="linear", warmup_steps=1, total_steps=5, final_ratio=0.2)
    assert actual == pytest.approx([1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine_decay_ends_at_the_final_ratio():
    # half a cosine over 4 steps: (1 + cos(0, 45, 90, 135, 180 degrees)) / 2, scaled to 1 .. 0.1
    half = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    expected = [0.5, 1, *(0.1 + 0.9 * value for value in half), 0.1]
    assert factors(8, schedule="cosine", warmup_steps=2, total_steps=6, final_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("final_ratio", [0.0, 0.3, 1.0])
def test_factors_rise_to_one_then_never_rise_again(schedule, warmup_steps, final_ratio):
    options = {"schedule": schedule, "warmup_steps": warmup_steps, "total_steps": 40, "final_ratio": final_ratio}
    values = factors(60, **options)
    assert values[0] > 0
    assert max(values) == values[warmup_steps] == 1.0
    assert values[:warmup_steps] == sorted(values[:warmup_steps])
    assert values[warmup_steps:] == sorted(values[warmup_steps:], reverse=True)
    assert values[40:] == pytest.approx([1.0 if schedule == "constant" else final_ratio] * 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step'; it must be one of 'constant', 'linear', 'cosine'"),
        ({"step": -1}, "step is -1; steps count from 0"),
        ({"warmup_steps": -2}, r"warmup_steps is -2; it must be 0 \(no warm-up\) or positive"),
        ({"final_ratio": 1.5}, "final_ratio is 1.5; it must lie between 0 and 1"),
        ({"final_ratio": math.nan}, "final_ratio is nan; it must lie between 0 and 1"),
        (
            {"warmup_steps": 10, "total_steps": 8},
            "schedule 'linear' decays from warmup_steps=10 to total_steps=8, which leaves 8 - 10 = -2 steps for it; "
            "raise total_steps, lower warmup_steps or use 'constant'",
        ),
    ],
)
def test_wrong_schedule_is_refused_with_the_arithmetic(changes, message):
    options = {"step": 0, "schedule": "linear", "warmup_steps": 2, "total_steps": 10, **changes}
    with pytest.raises(ValueError, match=f"^{message}$"):
        lr_factor(**options)


def test_decay_of_no_steps_is_refused_during_warm_up():
    with pytest.raises(ValueError, match="5 - 5 = 0 steps"):
        lr_factor(0, schedule="cosine", warmup_steps=5, total_steps=5)
