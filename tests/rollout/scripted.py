"""An engine with scripted samples, and a policy without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from rllava_pl.rollout.engine import ManagedEngine
from rllava_pl.types import Generation, Message, Prompt, PromptInputs, Request, Sampling

Change = Callable[[list[Generation]], list[Generation]]

POLICY = SimpleNamespace(
    banned_ids=[9],
    decode=lambda ids: " ".join(map(str, ids.tolist())),
    model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=20))),
)
"""Stands for a policy of 20 tokens, of which the ninth is banned; the text of a response are its ids."""


def request(uid: str, group: int, samples: int = 2, prefix_ids: tuple[int, ...] = ()) -> Request:
    prompt = Prompt(uid, (Message("user", ("Which digit is it?",)),))
    return Request(prompt, PromptInputs(torch.arange(4)), group, tuple(range(samples)), prefix_ids)


class Scripted:
    """Samples tokens 0 and 1 for every seed, in one ``advance``; records its calls.

    Args:
        change: Applied to what ``advance`` returns.
        at_a_time: Samples that one ``advance`` returns, the last ones first; all by default.
    """

    exact = True

    def __init__(self, change: Change = lambda generations: generations, at_a_time: int = 0) -> None:
        self.version = -1
        self.events: list[str] = []
        self.change = change
        self.at_a_time = at_a_time
        self.unfinished: list[Generation] = []

    def start(self, requests: Sequence[Request], sampling: Sampling) -> list[int]:
        self.events.append("start")
        prompts = [r.inputs.input_ids_S for r in requests for _ in r.seeds]
        ids, logp = torch.arange(2), torch.tensor([-0.5, -1.0])
        self.unfinished = [Generation(k, x, ids, logp, "stop", self.version) for k, x in enumerate(prompts)]
        return list(range(len(prompts)))

    def advance(self) -> list[Generation]:
        self.events.append("advance")
        kept = len(self.unfinished) - self.at_a_time if self.at_a_time else 0
        finished, self.unfinished = self.unfinished[max(kept, 0) :], self.unfinished[: max(kept, 0)]
        return self.change(finished)

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.events.append(f"sync {[name for name, _ in named_tensors]} {version}")
        self.version = version

    def sleep(self) -> None:
        self.events.append("sleep")

    def wake(self) -> None:
        self.events.append("wake")

    def close(self) -> None:
        self.events.append("close")


def managed(engine: object, version: Callable[[], int] = lambda: 3, **options: object) -> ManagedEngine:
    return ManagedEngine(lambda: engine, POLICY, lambda: [("lm_head.weight", torch.zeros(1))], version, **options)
