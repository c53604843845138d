"""Functions of ``functional`` chosen by name, with the options that they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rllava_pl.functional._numerics import check_choice

Function = Callable[..., Tensor]
FunctionOptions = Mapping[str, float | bool | None]


def choose(option: str, name: str, allowed: Sequence[str], module: object) -> Function:
    """The function ``name`` of ``module``.

    Raises:
        ValueError: It is none of ``allowed``.
    """
    check_choice(option, name, allowed)
    function: Function = getattr(module, name)
    return function


def tensor_inputs(function: Function) -> list[str]:
    """Names of the tensors that a function takes; its options are keyword-only."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]


def check_function_options(
    option: str, function: Function, options: FunctionOptions | None
) -> dict[str, float | bool | None]:
    """The options, if the function has all of them and gets all that it needs.

    Raises:
        ValueError: Naming an option that does not exist, or those that are missing.
    """
    options, parameters = dict(options or {}), inspect.signature(function).parameters.values()
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if unknown := [name for name in options if name not in known]:
        names = ", ".join(known) or "none"
        raise ValueError(f"{option}: {function.__name__} has no option {unknown[0]!r}; it has {names}")
    if missing := [name for name, p in known.items() if p.default is p.empty and name not in options]:
        raise ValueError(f"{option}: {function.__name__} needs {', '.join(missing)}")
    return options
