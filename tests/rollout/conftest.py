"""Tiny models, shared with the tests of the policy."""

from tests.models.conftest import load, tiny_path

__all__ = ["load", "tiny_path"]
