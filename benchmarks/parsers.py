"""How long the parsers of model output need for texts made to slow them down.

Every function of ``rewards/text.py``, and the rewards that run in the trainer, parse the same texts of up to 60,000
characters: random ones, and repetitions and nestings of what they search for. Times are CPU times of this process::

    python benchmarks/parsers.py
    python benchmarks/parsers.py --texts 2000 --seed 1
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator

import torch

from rllava_pl.rewards import AnswerTagReward, RepetitionPenalty
from rllava_pl.rewards import text as parsers
from rllava_pl.types import Message, Prompt, PromptInputs, Rollout, Segment

MAX_CHARS = 60_000
NAMES = ("think", "answer")
ATOMS = [
    *("<", ">", "/", "<answer>", "</answer>", "<think>", "</think>", "< / answer >", "<answer", "answer>", "<//"),
    *("<|im_end|>", "</s>", " ", "\n", "\t", "\u3000", "\x00", "\x85", "\u2028", "\ud800", "\U0001f600", "\u0301"),
    *("0", "7", "1,234", "1/3", "0.5", "%", "-", "+", ",", ".", "١", "７", "²", "½", "−", "–", "，", "。"),
    *(
        "a",
        "a ",
        "the ",
        "an",
        "x",
        "İ",
        "ß",
        "ﬁ",
        "色",
        "가",
        "ア",
        "\\boxed{",
        "{",
        "}",
        "$",
        "[",
        "]",
        "(",
        "_",
        "`",
    ),
]


def texts(number: int, seed: int = 0) -> Iterator[str]:
    """Texts of every length up to the longest, a tenth of them of that length; equal seeds give equal texts."""
    rng = random.Random(seed)
    for _ in range(number):
        length = MAX_CHARS if rng.random() < 0.1 else int(MAX_CHARS ** rng.random())
        yield rng.choice(_KINDS)(rng, length)[:length]


def _repeated(rng: random.Random, length: int) -> str:
    pattern = "".join(rng.choices(ATOMS, k=rng.randint(1, 4)))
    return pattern * (length // len(pattern) + 1)


def _mixed(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(rng.choices(ATOMS, k=rng.randint(2, 12)), k=length))


def _between(rng: random.Random, length: int) -> str:
    """A long repetition with something else before and after it."""
    start, stop = ("".join(rng.choices(ATOMS, k=rng.randint(0, 3))) for _ in range(2))
    return start + _repeated(rng, length)[: max(0, length - len(start) - len(stop))] + stop


def _enclosed(rng: random.Random, length: int) -> str:
    """A valid format with hostile contents."""
    return (
        f"<think>{_between(rng, length // 2)}</think><answer>{_between(rng, length // 2)}"[: length - 9] + "</answer>"
    )


def _any(rng: random.Random, length: int) -> str:
    return "".join(map(chr, rng.choices(range(0x11000), k=length)))


_KINDS = (_repeated, _mixed, _between, _enclosed, _any)


def rollout(text: str, answer: str) -> Rollout:
    """A response with one token per four characters, as is usual."""
    ids = torch.tensor([ord(char) for char in text[::4]], dtype=torch.int64)
    prompt = Prompt("row:0", (Message("user", ("Which?",)),), answer=answer)
    return Rollout(
        prompt, 0, PromptInputs(torch.tensor([1])), (Segment(ids, logprobs_T=torch.zeros(len(ids))),), text=text
    )


PARSERS: dict[str, Callable[[str], object]] = {
    "tag_tokens": lambda text: sum(1 for _ in parsers.tag_tokens(text, NAMES)),
    "blocks": lambda text: parsers.blocks(text, "answer"),
    "last_block": lambda text: parsers.last_block(text, "answer"),
    "strict": lambda text: parsers.strict(text, NAMES),
    "answer_scope": parsers.answer_scope,
    "normalise": lambda text: parsers.normalise(text[: parsers.MAX_ANSWER_CHARS]),  # the most that ``exact`` passes on
    "number": parsers.number,
    "exact": lambda text: parsers.exact(text, "the answer is 4"),
    "is_tag_name": parsers.is_tag_name,
    "last_boxed": parsers.last_boxed,
}
REWARDS = {"AnswerTagReward": AnswerTagReward(NAMES), "RepetitionPenalty": RepetitionPenalty()}


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of this process for one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(number: int, seed: int) -> dict[str, list[float]]:
    """Seconds of every parser for every text."""
    seconds: dict[str, list[float]] = {name: [] for name in (*PARSERS, *REWARDS)}
    for text in texts(number, seed):
        for name, parser in PARSERS.items():
            seconds[name].append(cpu_seconds(lambda: parser(text)))  # noqa: B023 - called at once
        answer = rollout(text, "the answer is 4")
        for name, reward in REWARDS.items():
            seconds[name].append(cpu_seconds(lambda: reward.score(answer)))  # noqa: B023
    return seconds


def main() -> None:
    """Print a table with one row per parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # waiting threads would be counted as work
    start = time.perf_counter()
    print("| parser | median us | p99.9 ms | max ms |\n|---|---|---|---|")
    for name, values in measure(args.texts, args.seed).items():
        values.sort()
        at = [values[(len(values) - 1) * part // 1000] for part in (500, 999, 1000)]
        print(f"| `{name}` | {1e6 * at[0]:.1f} | {1e3 * at[1]:.2f} | {1e3 * at[2]:.2f} |")
    print(f"\n{args.texts} texts in {time.perf_counter() - start:.0f} s, no exception")


if __name__ == "__main__":
    main()
