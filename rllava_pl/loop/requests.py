"""What is asked of the engine: a request for each prompt, its seeds a function of counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rllava_pl.distributed.collectives import rank
from rllava_pl.functional.seeds import seed_from
from rllava_pl.models.policy import Policy
from rllava_pl.types import Prompt, Request


def make_requests(
    policy: Policy, prompts: Sequence[Prompt], samples: int, stream: str, seed: int, rollout: int, round_: int = 0
) -> list[Request]:
    """Requests for ``samples`` completions of each prompt.

    seed of a sample = hash(run seed, stream, rollout index, prompt uid, number of the sample). The stream of a further
    round of dynamic sampling ends in its number; a prompt that stands in the batch twice continues to count.
    """
    seen: Counter[str] = Counter()
    stream = f"{stream}/{round_}" if round_ else stream
    requests = []
    for p, (prompt, inputs) in enumerate(zip(prompts, policy.encode(prompts), strict=True)):
        first = seen[prompt.uid] * samples
        seeds = tuple(seed_from(seed, stream, rollout, prompt.uid, g) for g in range(first, first + samples))
        requests.append(Request(prompt, inputs, group=(rank() << 32) + (round_ << 20) + p, seeds=seeds))
        seen[prompt.uid] += 1
    return requests
