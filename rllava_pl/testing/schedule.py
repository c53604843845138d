"""Which call has which fault."""

from __future__ import annotations

from collections.abc import Sequence

from rllava_pl.functional.seeds import seed_from


class Schedule:
    """Random but reproducible faults: a pure function of the seed and of what identifies a call.

    Example: ``Schedule(["dies", "hangs"], rate=0.05).at(17)`` is "dies", "hangs" or "", in any process.

    Args:
        kinds: Faults, all equally likely.
        rate: Part of the calls that have a fault.
        seed: Of the draws.
        known: All kinds there are.

    Raises:
        ValueError: An unknown kind, no kind, or a rate outside of 0 to 1.
    """

    def __init__(self, kinds: Sequence[str], rate: float, seed: int = 0, known: Sequence[str] = ()) -> None:
        if unknown := [kind for kind in kinds if known and kind not in known]:
            raise ValueError(f"faults: there is no {unknown[0]!r}; there are {', '.join(known)}")
        if not kinds:
            raise ValueError("faults is empty; name at least one kind, or remove the class")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate is {rate}; it is the part of the calls that fail, from 0 to 1")
        self.kinds = tuple(kinds)
        self.rate = rate
        self.seed = seed

    def at(self, *call: int | str) -> str:
        """The fault of this call; empty for most."""
        if seed_from(self.seed, "fault", *call) >= self.rate * 2**63:
            return ""
        return self.kinds[seed_from(self.seed, "kind", *call) % len(self.kinds)]
