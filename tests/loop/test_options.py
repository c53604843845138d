"""Option groups check themselves, keep the defaults of the algorithm, and old names say what they are called now."""

from __future__ import annotations

import dataclasses
import inspect
from math import inf, nan

import pytest

from rllava_pl.loop import options
from rllava_pl.loop.options import (
    KL,
    RENAMED,
    Batching,
    Clip,
    DynamicSampling,
    EngineCorrection,
    Evaluation,
    LengthPenalty,
    Masking,
    OptionGroup,
    Schedule,
    complete,
    plain_options,
)
from rllava_pl.modules import DAPO, GRPO, GSPO, HPT, RLOO, PolicyModule, Recipe, RLModule
from rllava_pl.modules.supervised import SupervisedModule
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.types import Sampling
from tests import runs

GROUPS = {
    "kl": KL,
    "clip": Clip,
    "batching": Batching,
    "schedule": Schedule,
    "length_penalty": LengthPenalty,
    "dynamic_sampling": DynamicSampling,
    "engine_correction": EngineCorrection,
    "masking": Masking,
    "evaluation": Evaluation,
}
OUT_OF_RANGE = [
    ("kl.loss_coef", -1.0, "must be at least 0"),
    ("kl.loss_coef", nan, "must be at least 0"),
    ("kl.reward_coef", -1.0, "must be at least 0"),
    ("kl.estimator", "k4", "must be one of k1"),
    ("kl.target", -0.1, "must be at least 0"),
    ("kl.horizon", 0, "must be at least 1"),
    ("clip.low", -0.2, "must be at least 0"),
    ("clip.high", nan, "must be at least 0"),
    ("clip.dual", 0.5, "must be larger than 1, or null"),
    ("batching.num_minibatches", 0, "must be at least 1"),
    ("batching.update_epochs", 0, "must be at least 1"),
    ("batching.micro_batch_size", -8, "must be at least 0"),
    ("batching.micro_batch_tokens", -1, "must be at least 0"),
    ("schedule.kind", "step", "must be one of constant"),
    ("schedule.warmup_steps", -1, "must be at least 0"),
    ("schedule.final_ratio", 9.0, "must be between 0 and 1"),
    ("length_penalty.buffer_tokens", -1, "must be at least 0, or null"),
    ("length_penalty.scale", -1.0, "must be at least 0"),
    ("dynamic_sampling.max_rounds", -1, "must be at least 0"),
    ("dynamic_sampling.min_informative", 0.0, "must be above 0 and at most 1"),
    ("dynamic_sampling.min_informative", 1.1, "must be above 0 and at most 1"),
    ("engine_correction.level", "word", "must be one of none"),
    ("engine_correction.mode", "clip", "must be one of truncate"),
    ("engine_correction.cap", 0.0, "must be larger than 0"),
    ("evaluation.samples", -1, "must be at least 0"),
]
UNRESTRICTED = {"masking.truncated", "dynamic_sampling.component"}
"""A bool, and a name that depends on the rewards."""


def instance(algorithm: type[PolicyModule], **values: object) -> PolicyModule:
    return algorithm(None, [AnswerTagReward()], **values)


def test_all_groups_are_in_the_tables() -> None:
    defined = {x for x in vars(options).values() if inspect.isclass(x) and issubclass(x, OptionGroup)}
    assert set(GROUPS.values()) == defined - {OptionGroup}
    names = {f"{group}.{field.name}" for group, cls in GROUPS.items() for field in dataclasses.fields(cls)}
    assert names == {name for name, _, _ in OUT_OF_RANGE} | UNRESTRICTED


@pytest.mark.parametrize(("name", "value", "rule"), OUT_OF_RANGE)
def test_value_out_of_range_is_refused_by_its_dotted_name(name: str, value: object, rule: str) -> None:
    group, field = name.split(".")
    with pytest.raises(ValueError) as error:
        GROUPS[group](**{field: value})
    assert str(error.value).startswith(f"{name} is {value!r}; it ") and rule in str(error.value).replace("'", "")


@pytest.mark.parametrize(
    "value", [Clip(high=inf), Clip(low=0.0), KL(horizon=1), LengthPenalty(buffer_tokens=None), Schedule(final_ratio=1)]
)
def test_ends_of_a_range_are_allowed(value: OptionGroup) -> None:
    assert value.fields_set


def test_groups_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Clip().low = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(("buffer_tokens", "tokens"), [(0, 0), (7, 7), (None, 20)])
def test_length_buffer_is_in_tokens_and_null_means_a_fifth_of_the_budget(buffer_tokens, tokens) -> None:
    assert LengthPenalty(buffer_tokens).resolve_buffer_tokens(100) == tokens


def test_positional_and_named_fields_count_as_set() -> None:
    assert Clip(0.1, dual=3.0).fields_set == {"low", "dual"}
    assert Clip(0.1).with_defaults(Clip(0.3, 0.4, 5.0)) == Clip(0.1, 0.4, 5.0)


@pytest.mark.parametrize("algorithm", runs.ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def test_partial_group_keeps_the_defaults_of_the_algorithm(algorithm: type[PolicyModule]) -> None:
    """Every field set alone, to the value of the class: all other fields stay those of the algorithm."""
    default = instance(algorithm)
    for name in GROUPS.keys() & inspect.signature(algorithm).parameters.keys():
        expected = getattr(default, name)
        for field in dataclasses.fields(expected):
            partial = GROUPS[name](**{field.name: getattr(expected, field.name)})
            assert getattr(instance(algorithm, **{name: partial}), name) == expected


@pytest.mark.parametrize(
    ("algorithm", "given", "completed"),
    [
        (GSPO, {"clip": Clip(high=5e-4)}, Clip(3e-4, 5e-4)),
        (DAPO, {"clip": Clip(low=0.1)}, Clip(0.1, 0.28)),
        (HPT, {"clip": Clip(dual=3.0)}, Clip(1.0, inf, 3.0)),
        (GRPO, {"kl": KL(estimator="k2")}, KL(loss_coef=0.04, estimator="k2")),
        (RLOO, {"kl": KL(target=0.1)}, KL(reward_coef=0.001, target=0.1)),
        (DAPO, {"dynamic_sampling": DynamicSampling(component="iou")}, DynamicSampling(20, component="iou")),
        (DAPO, {"length_penalty": LengthPenalty(scale=0.5)}, LengthPenalty(None, 0.5)),
        (GRPO, {"engine_correction": EngineCorrection(cap=5.0)}, EngineCorrection("token", "truncate", 5.0)),
    ],
)
def test_partial_group_is_completed_by_the_algorithm(algorithm, given, completed) -> None:
    ((name, group),) = given.items()
    assert getattr(instance(algorithm, **given), name) == completed == complete(algorithm, name, group)


def test_subclass_outside_of_the_package_inherits_and_overrides_defaults() -> None:
    class Child(DAPO):
        pass

    class Own(DAPO):
        def __init__(self, *args, clip: Clip = Clip(low=0.4), **kwargs) -> None:
            super().__init__(*args, clip=clip, **kwargs)

    assert instance(Child, clip=Clip(low=0.1)).clip == Clip(0.1, 0.28)
    assert instance(Own, clip=Clip(dual=2.0)).clip == Clip(0.4, 0.2, 2.0)
    assert {"clip", "group_size", "max_grad_norm"} <= inspect.signature(Child).parameters.keys()


def test_plain_options_are_completed() -> None:
    plain = plain_options(DAPO, {"clip": Clip(low=0.1), "seed": 3, "sampling": Sampling()})
    assert plain["clip"] == {"low": 0.1, "high": 0.28, "dual": None} and plain["seed"] == 3
    assert plain["sampling"]["max_tokens"] == 256


@pytest.mark.parametrize("algorithm", [GRPO, Recipe])
@pytest.mark.parametrize("name", RENAMED)
def test_old_name_is_refused_with_the_new_one(algorithm: type[RLModule], name: str) -> None:
    with pytest.raises(TypeError) as error:
        instance(algorithm, **{name: 1})
    assert str(error.value) == f"{algorithm.__name__}: option {name} is now {RENAMED[name]}"


@pytest.mark.parametrize("name", RENAMED)
def test_new_names_exist(name: str) -> None:
    path = RENAMED[name].partition(",")[0].split(".")
    assert path[0] in inspect.signature(GRPO).parameters
    if len(path) == 2:
        assert path[1] in {field.name for field in dataclasses.fields(GROUPS[path[0]])}


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="GRPO: option grup_size does not exist"):
        instance(GRPO, grup_size=4)


@pytest.mark.parametrize("algorithm", [x for x in runs.ALGORITHMS if issubclass(x, SupervisedModule)])
@pytest.mark.parametrize("name", ["group_size", "kl", "clip", "dynamic_sampling", "entropy_coef", "engine_correction"])
def test_supervised_methods_have_no_options_of_rl(algorithm: type[SupervisedModule], name: str) -> None:
    assert name not in inspect.signature(algorithm).parameters
    with pytest.raises(TypeError, match=f"{algorithm.__name__}: option {name} does not exist"):
        instance(algorithm, **{name: 1})
