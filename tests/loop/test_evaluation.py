"""Evaluation: greedy and sampled answers, means over batches, rows to which a reward does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from rllava_pl.loop.evaluation import Evaluator, Scores
from rllava_pl.rewards import BaseReward, RewardOutput, RewardRunner, Scoring
from rllava_pl.types import Prompt, Request, Rollout, Sampling, Score
from tests.modules.cases import prompt, rollout

CPU, NAN = torch.device("cpu"), float("nan")


class Engine:
    """Answers each seed with its number of tokens; notes how it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        rollouts = [rollout(r.prompt, r.group, tokens=1 + seed) for r in requests for seed in r.seeds]
        self.asked.append((len(rollouts), sampling.temperature))
        return rollouts


class Length(BaseReward):
    """The number of tokens."""

    components = ("tokens",)

    def score(self, rollout: Rollout) -> Score:
        tokens = float(len(rollout.response_ids))
        return Score(tokens, {"tokens": tokens})


def requests(prompts: Sequence[Prompt], *, samples: int, stream: str) -> list[Request]:
    inputs = SimpleNamespace()
    return [Request(p, inputs, group, tuple(range(samples))) for group, p in enumerate(prompts)]


@pytest.fixture
def evaluator() -> Evaluator:
    runner = RewardRunner([Length()], Scoring(isolation="none"))
    made = Evaluator(Sampling(temperature=1.5), runner, requests)
    made.connect(Engine())
    made.start(CPU)
    return made


def test_step_takes_one_greedy_answer_and_samples_beside_it(evaluator: Evaluator) -> None:
    """Greedy: 1 token each. Three samples of 1, 2 and 3 tokens: mean 2."""
    evaluator.step([prompt("a"), prompt("b")], samples=3, stream="val")
    assert evaluator.engine.asked == [(2, 0.0), (6, 1.5)]
    assert evaluator.results("val") == {
        "val/reward": 1.0,
        "val/tokens": 1.0,
        "val/unscored": 0.0,
        "val/reward_sampled": 2.0,
        "val/tokens_sampled": 2.0,
        "val/unscored_sampled": 0.0,
    }


def test_start_forgets_earlier_scores(evaluator: Evaluator) -> None:
    evaluator.step([prompt("a")], samples=0, stream="val")
    evaluator.start(CPU)
    assert evaluator.results("val") == {}


def test_evaluate_returns_rollouts_and_their_rewards(evaluator: Evaluator) -> None:
    rollouts, output = evaluator.evaluate([prompt("a")], samples=2)
    assert [len(r.response_ids) for r in rollouts] == output.rewards == [1.0, 2.0]


def test_no_prompts_are_no_answers(evaluator: Evaluator) -> None:
    evaluator.step([], samples=2, stream="val")
    assert evaluator.results("val") == {} and evaluator.engine.asked == [(0, 0.0), (0, 1.5)]


def test_scores_are_means_over_all_rows_of_unequal_batches() -> None:
    scores = Scores(CPU)
    scores.update(RewardOutput([1.0, 0.0, 0.0], {"accuracy": [1.0, 0.0, 0.0]}, {}))
    scores.update(RewardOutput([1.0], {"accuracy": [1.0]}, {}))
    scores.add("nll", torch.tensor([2.0, 4.0]))
    assert scores.compute() == {"accuracy": 0.5, "nll": 3.0, "reward": 0.5, "unscored": 0.0}


def test_unscored_row_counts_as_zero_and_as_unscored() -> None:
    scores = Scores(CPU)
    scores.update(RewardOutput([1.0, None], {"accuracy": [1.0, NAN]}, {"timeout": 1}))
    assert scores.compute() == {"accuracy": 0.5, "reward": 0.5, "unscored": 0.5}


def test_row_to_which_a_reward_does_not_apply_is_left_out_of_its_component() -> None:
    scores = Scores(CPU)
    output = RewardOutput([1.0, 1.0], {"iou": [0.6, NAN]}, {}, applies={"iou": [True, False]})
    scores.update(output)
    assert scores.compute() == {"iou": pytest.approx(0.6), "reward": 1.0, "unscored": 0.0}
