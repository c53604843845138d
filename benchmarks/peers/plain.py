"""GRPO by hand: one file of torch and transformers, doing the same work with the same sharing, and nothing else.

It supports one model family, prompts of equal length, one reward and one device. It is the reference for the overhead
of a framework, so it is written for speed. From the package it takes the prompts and the attention function over packed
rows (``shared_prompt``).
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rllava_pl.models import shared_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _common import Pace, Work
    from transformers import PreTrainedModel, ProcessorMixin

    from rllava_pl.types import Prompt

Inputs = dict[str, Tensor]
BANNED_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>"]
NAMES = ("reward", "response_tokens", "loss", "entropy", "kl", "clip_fraction", "grad_norm")
FORMAT = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)


class Completions(NamedTuple):
    """N sampled responses, padded to the longest."""

    ids_NT: Tensor
    logp_NT: Tensor
    mask_NT: Tensor

    def of(self, rows: Tensor) -> Completions:
        """Some of them."""
        return Completions(*(x[rows] for x in self))


def run(work: Work, pace: Pace) -> None:
    """Train until the driver has seen all steps."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(work.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(work.checkpoint, dtype=torch.float32)  # in evaluation mode
    shared_prompt.enable(model)
    reference = copy.deepcopy(model).requires_grad_(False)
    banned = torch.tensor(processor.tokenizer.convert_tokens_to_ids(BANNED_TOKENS))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(update, work))
    generator = torch.Generator().manual_seed(work.seed)
    writer, bar = SummaryWriter(f"{work.output}/plain"), tqdm(total=work.steps)
    pace.begin()
    for step, prompts in enumerate(batches(work)):
        inputs = encode(processor, prompts)
        done = sample(model, inputs, banned, generator, work)
        texts = processor.tokenizer.batch_decode(done.ids_NT, skip_special_tokens=True)
        rewards_PG = torch.tensor([reward(text, prompts[n // work.group_size].answer) for n, text in enumerate(texts)])
        rewards_PG = rewards_PG.view(-1, work.group_size)
        advantages = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-6)
        with torch.no_grad():
            ref_NT, _ = log_probs(reference, inputs, done, banned)
        metrics = []
        rows_PG = torch.arange(rewards_PG.numel()).view_as(rewards_PG)
        for part in torch.randperm(len(prompts), generator=generator).chunk(work.minibatches):
            rows = rows_PG[part].flatten()
            some = {name: x[part] for name, x in inputs.items()}
            loss, facts = grpo_loss(model, some, done.of(rows), ref_NT[rows], advantages[part].flatten(), banned, work)
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            metrics.append(torch.stack([*facts, norm]))
        length = done.mask_NT.sum(1, dtype=torch.float32).mean()
        report = torch.stack([rewards_PG.mean(), length, *torch.stack(metrics).mean(0)]).tolist()  # one transfer
        for name, value in zip(NAMES, report, strict=True):
            writer.add_scalar(name, value, step)
        bar.set_postfix(reward=report[0])
        bar.update()
        pace.tick(lambda: {"reward": report[0]})  # noqa: B023 - called at once


def batches(work: Work) -> Iterator[list[Prompt]]:
    """The prompts of every step."""
    rows = work.dataset()
    for step in range(work.steps):
        yield rows[step * work.prompts : (step + 1) * work.prompts]


def lr_factor(update: int, work: Work) -> float:
    """Linear warm-up, then linear decay to 10 %."""
    if update < work.warmup_updates:
        return (update + 1) / work.warmup_updates
    return 1 - 0.9 * (update - work.warmup_updates) / max(1, work.updates - work.warmup_updates)


def encode(processor: ProcessorMixin, prompts: list[Prompt]) -> Inputs:
    """Chat template and processor; every prompt is one picture above one question."""
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.messages[0].parts[1]}]}]
        for prompt in prompts
    ]
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    return dict(processor(text=texts, images=[list(prompt.images) for prompt in prompts], return_tensors="pt"))


@torch.no_grad()
def sample(
    model: PreTrainedModel, inputs: Inputs, banned: Tensor, generator: torch.Generator, work: Work
) -> Completions:
    """Read every prompt once, expand the cache to the group, then draw token after token."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache, logits_NV = out.past_key_values, out.logits[:, -1].repeat_interleave(work.group_size, 0)
    cache.batch_repeat_interleave(work.group_size)
    stop, rows = model.generation_config.eos_token_id, torch.arange(len(logits_NV))
    ids_NT = torch.zeros(len(rows), work.max_tokens, dtype=torch.int64)
    logp_NT, mask_NT = torch.zeros(ids_NT.shape), torch.zeros(ids_NT.shape, dtype=torch.bool)
    for step in range(work.max_tokens):
        logp_NV = logits_NV.index_fill(1, banned, float("-inf")).log_softmax(-1)
        token = torch.multinomial(logp_NV.exp(), 1, generator=generator)
        ids_NT[rows, step] = token[:, 0]
        logp_NT[rows, step] = logp_NV.gather(1, token)[:, 0]
        mask_NT[rows, step] = True
        going = (token[:, 0] != stop).nonzero()[:, 0]
        if not len(going) or step + 1 == work.max_tokens:
            break
        if len(going) < len(rows):  # rows that have ended leave the batch
            rows, token = rows[going], token[going]
            cache.batch_select_indices(going)
        logits_NV = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
    return Completions(ids_NT[:, : step + 1], logp_NT[:, : step + 1], mask_NT[:, : step + 1])


def reward(text: str, answer: str) -> float:
    """0.1 for the form, 0.9 more for the right answer."""
    form = FORMAT.fullmatch(text)
    return 0.0 if form is None else 0.1 + 0.9 * (form[1].strip().lower() == answer)


def log_probs(model: PreTrainedModel, inputs: Inputs, done: Completions, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the responses and of all tokens in their place; every prompt is computed once, in a packed row."""
    prompts, width = inputs["input_ids"].shape
    steps_N = done.mask_NT.sum(1) - 1
    layout = shared_prompt.Layout.of([width] * prompts, steps_N.tolist(), torch.device("cpu"))
    following = width + torch.arange(int(steps_N.max())).expand(len(steps_N), -1)
    hidden = model.model(
        input_ids=layout.row(inputs["input_ids"], done.ids_NT[:, : following.shape[1]])[None],
        pixel_values=inputs["pixel_values"].flatten(0, 1)[None],
        pixel_attention_mask=inputs["pixel_attention_mask"].flatten(0, 1)[None],
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # 4-D: passed on unread
        position_ids=layout.row(torch.arange(width).expand(prompts, -1), following)[None],
        shared_prompt=layout,
        use_cache=False,
    ).last_hidden_state[0]
    first = layout.last_P.repeat_interleave(len(steps_N) // prompts)
    predictors_NT = torch.cat([first[:, None], layout.response_slots_NR], 1)
    predictors_NT = torch.nn.functional.pad(predictors_NT, (0, done.ids_NT.shape[1] - predictors_NT.shape[1]))
    hidden_NTH = hidden.index_select(0, predictors_NT.flatten()).unflatten(0, predictors_NT.shape)
    logp_NTV = model.lm_head(hidden_NTH).index_fill(-1, banned, -1e30).log_softmax(-1)
    return logp_NTV.gather(-1, done.ids_NT[:, :, None])[:, :, 0], logp_NTV


def grpo_loss(
    model: PreTrainedModel,
    inputs: Inputs,
    done: Completions,
    ref_NT: Tensor,
    advantages_N: Tensor,
    banned: Tensor,
    work: Work,
) -> tuple[Tensor, list[Tensor]]:
    """Clipped surrogate + KL (k3), mean over tokens and then over completions; and what to report of it."""
    logp_NT, logp_NTV = log_probs(model, inputs, done, banned)
    ratio_NT = (logp_NT - done.logp_NT).exp()
    bounded_NT = ratio_NT.clamp(1 - work.clip_low, 1 + work.clip_high)
    gain_NT = torch.minimum(ratio_NT * advantages_N[:, None], bounded_NT * advantages_N[:, None])
    d_NT = ref_NT - logp_NT
    kl_NT = d_NT.exp() - d_NT - 1
    mask_NT = done.mask_NT.float()
    loss = ((work.kl_coef * kl_NT - gain_NT) * mask_NT).sum(1).div(mask_NT.sum(1)).mean()
    with torch.no_grad():
        entropy_NT = -(logp_NTV.exp() * logp_NTV).sum(-1)
        seen = [entropy_NT, kl_NT, (ratio_NT != bounded_NT).float()]
        means = [(x_NT * mask_NT).sum() / mask_NT.sum() for x_NT in seen]
    return loss, [loss.detach(), *means]
