"""Imports that would make every call wait, help and error messages included."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


class _OnUse:
    """Stands for a class of transformers and becomes it when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(getattr(import_module("transformers"), self._name), attribute)


class _StandIn(ModuleType):
    """Stands for transformers while others import names from it."""

    def __getattr__(self, name: str) -> _OnUse:
        if name.startswith("__"):
            raise AttributeError(name)
        return _OnUse(name)


def import_torchmetrics() -> None:
    """Import torchmetrics without the transformers, scikit-learn, scipy and pandas it draws in for a text metric.

    Lightning needs torchmetrics, which imports ``AutoModel`` at once for its BERTScore: about a third of the start-up
    time. During that import alone a stand-in answers for transformers; BERTScore still works, at its first use.
    """
    if "transformers" in sys.modules or "torchmetrics" in sys.modules or find_spec("transformers") is None:
        return
    stand_in = _StandIn("transformers")
    stand_in.__spec__ = find_spec("transformers")
    sys.modules["transformers"] = stand_in
    try:
        import_module("torchmetrics")
    finally:
        del sys.modules["transformers"]
