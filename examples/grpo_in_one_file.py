"""GRPO for vision-language models in one file, to read from top to bottom: torch, transformers and a plain loop.

The steps of the package's loop, in the same order and under the same names, without engines, callbacks and strategies:
sample, score, log-probs, advantages, update. A tiny random model learns to name the colour of a drawn shape, from
rewards alone::

    python examples/grpo_in_one_file.py 80

Half a minute on one CPU core; accuracy on unseen pictures goes from 1/6 to above 0.9.

Suffixes are dimensions: P prompts, G completions of each, N = P·G samples (row p·G + g is completion g of prompt p),
S prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from rllava_pl.datamodules.synthetic import TASKS, DrawnPrompts
from rllava_pl.functional.advantages import grpo
from rllava_pl.functional.kl import kl_estimate
from rllava_pl.functional.logprobs import token_log_probs
from rllava_pl.functional.losses import clipped
from rllava_pl.functional.reduce import reduce_loss
from rllava_pl.models import tiny
from rllava_pl.types import Prompt

TASK = TASKS["color"]  # "What color is the shape?" red, green, blue, yellow, purple or white
PROMPTS, GROUP_SIZE, NUM_MINIBATCHES = 32, 8, 2  # a rollout: 32 x 8 completions, two optimizer steps
MAX_TOKENS = 8
LEARNING_RATE, WARMUP_ROLLOUTS = 1e-3, 10
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
KL_COEF = 0.04
BANNED = ("<image>", "<fake_token_around_image>", "<global-img>")  # a placeholder without an image has no meaning


@dataclass(frozen=True)
class Policy:
    """π(token | picture, question, earlier tokens): a model, and the processor that turns prompts into its inputs."""

    model: PreTrainedModel
    processor: ProcessorMixin

    def encode(self, prompts: list[Prompt], copies: int = 1) -> dict[str, Tensor]:
        """Chat template and image processor; every prompt ``copies`` times in a row. All are equally long here."""
        repeated = [prompt for prompt in prompts for _ in range(copies)]
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TASK.question}]}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        images = [list(prompt.images) for prompt in repeated]
        return dict(self.processor(text=[text] * len(repeated), images=images, return_tensors="pt"))

    def decode(self, ids_NT: Tensor) -> list[str]:
        """Texts, for the rewards; they are never tokenised again, for that could give other tokens."""
        return self.processor.tokenizer.batch_decode(ids_NT, skip_special_tokens=True)

    @property
    def banned_ids(self) -> list[int]:
        """Tokens that are never sampled, and so have probability 0 in the log-probs as well."""
        return self.processor.tokenizer.convert_tokens_to_ids(list(BANNED))

    @torch.no_grad()
    def sample(self, inputs: dict[str, Tensor], greedy: bool = False) -> tuple[Tensor, Tensor]:
        """One completion a row: ids (N, T), and a mask that is True up to the end token, which belongs to it."""
        choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        sequences = self.model.generate(**inputs, **choice, max_new_tokens=MAX_TOKENS, suppress_tokens=self.banned_ids)
        ids_NT = sequences[:, inputs["input_ids"].shape[1] :]
        ended_NT = ids_NT == self.model.generation_config.eos_token_id
        return ids_NT, ended_NT.cumsum(1) - ended_NT.long() == 0

    def log_probs(self, inputs: dict[str, Tensor], ids_NT: Tensor) -> Tensor:
        """Log π of the sampled tokens, (N, T): the logits at position S - 1 + t predict response token t."""
        extended = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids_NT], 1))
        extended["attention_mask"] = torch.ones_like(extended["input_ids"])  # causal: nothing sees what follows its end
        logits = self.model(**extended, use_cache=False, logits_to_keep=ids_NT.shape[1] + 1).logits[:, :-1]
        return token_log_probs(logits, ids_NT, banned_ids=self.banned_ids)[0]


@dataclass(frozen=True)
class TrainingBatch:
    """The samples of one rollout, N rows each."""

    inputs: dict[str, Tensor]
    ids_NT: Tensor
    mask_NT: Tensor
    old_logp_NT: Tensor
    """Under the policy that sampled."""
    ref_logp_NT: Tensor
    """Under the policy before all training."""
    rewards_N: Tensor
    advantages_N: Tensor


def reward(text: str, answer: str) -> float:
    """0.1 for the form, 0.9 more for the right answer."""
    form = re.fullmatch(r"<answer>(\w+)</answer>", text)
    return 0.0 if form is None else 0.1 + 0.9 * (form[1] == answer)


@torch.no_grad()
def rollout(policy: Policy, reference: Policy, prompts: list[Prompt]) -> TrainingBatch:
    """Sample, score, log-probs, advantages."""
    inputs = policy.encode(prompts, GROUP_SIZE)
    ids_NT, mask_NT = policy.sample(inputs)
    answers = [prompt.answer for prompt in prompts for _ in range(GROUP_SIZE)]
    texts = policy.decode(ids_NT)
    rewards_N = torch.tensor([reward(text, answer) for text, answer in zip(texts, answers, strict=True)])
    group_N = torch.arange(len(prompts)).repeat_interleave(GROUP_SIZE)
    return TrainingBatch(
        inputs=inputs,
        ids_NT=ids_NT,
        mask_NT=mask_NT,
        old_logp_NT=policy.log_probs(inputs, ids_NT),
        ref_logp_NT=reference.log_probs(inputs, ids_NT),
        rewards_N=rewards_N,
        advantages_N=grpo(rewards_N, group_N),  # (r - mean) / std within each group: no critic is needed
    )


def update(policy: Policy, optimizer: torch.optim.Optimizer, batch: TrainingBatch) -> None:
    """One pass over the batch: each mini-batch, of whole groups, is one optimizer step."""
    rows_PG = torch.arange(len(batch.rewards_N)).view(-1, GROUP_SIZE)
    for part_P in torch.randperm(len(rows_PG)).chunk(NUM_MINIBATCHES):
        rows = rows_PG[part_P].flatten()
        inputs = {name: x[rows] for name, x in batch.inputs.items()}
        loss = grpo_loss(policy.log_probs(inputs, batch.ids_NT[rows]), batch, rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()


def grpo_loss(logp_NT: Tensor, batch: TrainingBatch, rows: Tensor) -> Tensor:
    """-min(A·ρ, A·clip(ρ)) + β·KL(π || π_ref), mean over the tokens of a completion and then over completions."""
    advantages_NT = batch.advantages_N[rows, None].expand_as(logp_NT)
    surrogate_NT = clipped(logp_NT, batch.old_logp_NT[rows], advantages_NT, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
    kl_NT = kl_estimate(logp_NT, batch.ref_logp_NT[rows], "k3")
    return reduce_loss(surrogate_NT + KL_COEF * kl_NT, batch.mask_NT[rows], "sequence-mean-token-mean")


def accuracy(policy: Policy, prompts: list[Prompt]) -> float:
    """Fraction of right answers when the most likely token is taken at every step."""
    ids_NT, _ = policy.sample(policy.encode(prompts), greedy=True)
    right = [reward(text, p.answer) == 1.0 for text, p in zip(policy.decode(ids_NT), prompts, strict=True)]
    return sum(right) / len(right)


def load(directory: Path) -> Policy:
    """A model that knows the answer format and nothing of pictures."""
    tiny.build(directory, questions=[TASK.question], answers=TASK.answers, seed=1)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    return Policy(model.eval(), AutoProcessor.from_pretrained(directory))  # no dropout: ρ must start at 1


def main(steps: int = 80) -> list[float]:
    """Train, print, and return the mean reward of every rollout."""
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = load(Path(folder) / "tiny")
    reference = Policy(copy.deepcopy(policy.model).requires_grad_(False), policy.processor)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=WARMUP_ROLLOUTS)
    train, test = DrawnPrompts("color", "train", steps * PROMPTS), DrawnPrompts("color", "test", 96)[:]
    print(f"accuracy before: {accuracy(policy, test):.2f}")
    rewards = []
    for step in range(steps):
        batch = rollout(policy, reference, train[step * PROMPTS : (step + 1) * PROMPTS])
        update(policy, optimizer, batch)
        warmup.step()
        rewards.append(batch.rewards_N.mean().item())
        print(f"rollout {step + 1}: reward {rewards[-1]:.2f}")
    print(f"accuracy after: {accuracy(policy, test):.2f}")
    return rewards


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
