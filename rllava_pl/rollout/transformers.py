"""The embedded engine: samples with the trainer's own weights, on any device, with nothing to synchronise.

Each prompt is read once and its cache expanded to the group; then one token at a time is drawn for all rows. The
log-probs are those of exactly the distribution that is trained (temperature, banned tokens), so in fp32 they serve as
the old log-probs and no second pass is needed.

Randomness is a function of counters: row n draws its t-th token with the uniform number u(seed_n, t) by inverting the
cumulative distribution, so a sample depends on its seed alone and not on what else is in the batch. Tokens given with
a request (``prefix_ids``) are read with the prompt and draw no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks
from rllava_pl.distributed.signals import abort_if_asked
from rllava_pl.functional.seeds import uniforms
from rllava_pl.models.encoding import extend
from rllava_pl.models.policy import Policy, next_positions
from rllava_pl.types import PromptInputs, Request, Rollout, Sampling, Turn


class TransformersEngine:
    """Rollouts from the policy itself.

    Args:
        policy: The one that is trained; its weights are read at every call.
        batch_prompts: Prompts sampled at a time; bounds the memory of the cache.
        parts: Context in which the policy's model may be called by itself, where it is sharded.
        in_step: Whether every call of a layer is a call on all ranks. They then make equally many: ranks with fewer
            prompts, or whose answers have ended, go on with rows that count for nothing.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        batch_prompts: int = 64,
        parts: Callable[[], AbstractContextManager[None]] = nullcontext,
        in_step: bool = False,
    ) -> None:
        if batch_prompts < 1:
            raise ValueError(f"batch_prompts is {batch_prompts}; at least one prompt must be sampled at a time")
        self.policy = policy
        self.batch_prompts = batch_prompts
        self.parts = parts
        self.in_step = in_step
        self.version = -1

    @property
    def exact(self) -> bool:
        """True in fp32 without autocast: sampling and training then agree to rounding."""
        return self.policy.dtype == torch.float32 and not torch.is_autocast_enabled(self.policy.device.type)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Complete every request once a seed; see ``RolloutEngine``."""
        rollouts: list[Rollout] = []
        with _evaluating(self.policy), self.parts(), torch.no_grad():
            for batch in self._batches(requests):
                rollouts += self._complete(batch, sampling)
        return rollouts

    def _batches(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """``batch_prompts`` requests at a time; in step, as many batches on every rank, the last ones empty."""
        batches = -(-len(requests) // self.batch_prompts)
        if self.in_step:
            batches = int(max_over_ranks(torch.tensor(batches, device=self.policy.device)))
        for start in range(0, batches * self.batch_prompts, self.batch_prompts):
            yield requests[start : start + self.batch_prompts]

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Nothing to copy: the engine reads the trained weights themselves."""
        self.version = version

    def sleep(self) -> None:
        """Holds no memory between calls."""

    def wake(self) -> None:
        """Always ready."""

    def close(self) -> None:
        """Nothing to free."""

    def _complete(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        row_of_N = [p for p, request in enumerate(requests) for _ in request.seeds] or [0]
        seeds = [seed for request in requests for seed in request.seeds] or [0]
        sampler = _Sampler(self.policy, sampling, torch.tensor(seeds, device=self.policy.device), self.in_step)
        contexts = [self._context(request) for request in requests] or [self.policy.blank]
        if _expandable(self.policy):
            self._decode(contexts, torch.tensor(row_of_N, device=self.policy.device), sampler)
        else:
            self._generate([contexts[p] for p in row_of_N], sampler)
        return [
            self._rollout(requests[p], ids, logp, stopped)
            for p, ids, logp, stopped in zip(row_of_N, *sampler.result(), strict=True)
            if requests
        ]

    def _context(self, request: Request) -> PromptInputs:
        """What sampling starts from: the prompt and the tokens given with it."""
        if not request.prefix_ids:
            return request.inputs
        if misplaced := {*self.policy.banned_ids, *self.policy.stop_ids}.intersection(request.prefix_ids):
            tokens = self.policy.tokenizer.convert_ids_to_tokens(sorted(misplaced))
            raise ValueError(
                f"prefix_ids of prompt {request.prompt.uid!r} hold {tokens}; a response goes on behind text only, not "
                "behind an end token or a token that stands for image content"
            )
        return extend(request.inputs, request.prefix_ids)

    def _rollout(self, request: Request, sampled_ids: Tensor, sampled_logp: Tensor, stopped: bool) -> Rollout:
        given = len(request.prefix_ids)
        ids_T = torch.cat([sampled_ids.new_tensor(request.prefix_ids), sampled_ids])
        return Rollout(
            prompt=request.prompt,
            group=request.group,
            prompt_ids=request.inputs.input_ids_S,
            inputs=request.inputs,
            response_ids=ids_T,
            engine_logprobs=torch.nn.functional.pad(sampled_logp, (given, 0)),
            response_mask=torch.ones_like(ids_T, dtype=torch.bool),
            finish_reason="stop" if stopped else "length",
            weight_version=self.version,
            text=self.policy.decode(ids_T),
            turns=(Turn(given, len(ids_T)),),
            demo_mask=torch.arange(len(ids_T)) < given if given else None,
        )

    def _decode(self, contexts: Sequence[PromptInputs], row_of_N: Tensor, sampler: _Sampler) -> None:
        """Prefill every prompt once, expand the cache to its samples, then draw token after token."""
        model, inputs = self.policy.model, self.policy.collate(contexts)
        padded = not bool(inputs["attention_mask"].all())
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cache.batch_select_indices(row_of_N)
        attention = inputs["attention_mask"][row_of_N]
        position = next_positions(inputs["position_ids"])[row_of_N][:, None]
        axes = inputs["position_ids"].ndim == 3
        tokens = sampler.draw(out.logits[row_of_N, -1])
        del inputs, out  # pixels are large, and not needed any more
        while not sampler.finished:
            if (kept := sampler.drop_finished()) is not None:
                cache.batch_select_indices(kept)
                attention, position, tokens = attention[kept], position[kept], tokens[kept]
            attention = torch.nn.functional.pad(attention, (0, 1), value=1)
            out = model(
                input_ids=tokens[:, None],
                attention_mask=attention if padded else None,
                position_ids=position.expand(3, -1, -1) if axes else position,
                past_key_values=cache,
                use_cache=True,
            )
            tokens = sampler.draw(out.logits[:, -1])
            position = position + 1

    def _generate(self, contexts_N: Sequence[PromptInputs], sampler: _Sampler) -> None:
        """Fallback through the model's own ``generate``, where caches cannot be expanded: the prompt once a sample."""
        from transformers import LogitsProcessorList

        inputs = self.policy.collate(contexts_N)
        del inputs["position_ids"]  # generate derives them itself
        self.policy.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=sampler.sampling.max_tokens,
            logits_processor=LogitsProcessorList([sampler.force]),
            eos_token_id=self.policy.stop_ids,
            pad_token_id=self.policy.pad_id,
            synced_gpus=self.in_step,
        )


class _Sampler:
    """Draws tokens row by row and remembers ids, log-probs and which rows have ended."""

    def __init__(self, policy: Policy, sampling: Sampling, seeds_N: Tensor, in_step: bool = False) -> None:
        self.sampling = sampling
        self.in_step = in_step
        self.temperature = sampling.temperature or policy.temperature
        """Of the log-probs: those of a greedy response are the policy's, as the trainer scores it."""
        self.seeds_N = seeds_N
        self.banned = torch.tensor(policy.banned_ids, dtype=torch.int64, device=policy.device)
        self.stops = torch.tensor(policy.stop_ids, device=policy.device)
        self.pad_id = policy.pad_id
        rows = len(seeds_N)
        self.ids_NT = torch.zeros(rows, sampling.max_tokens, dtype=torch.int64, device=policy.device)
        self.logp_NT = torch.zeros(rows, sampling.max_tokens, dtype=torch.float32, device=policy.device)
        self.length_N = torch.zeros(rows, dtype=torch.int64, device=policy.device)
        self.stopped_N = torch.zeros(rows, dtype=torch.bool, device=policy.device)
        self.alive = torch.arange(rows, device=policy.device)
        """Rows that are still in the batch, some of which may have ended."""
        self.step = 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to draw, here or, in step, on any rank; then collective."""
        if self.step == self.sampling.max_tokens:
            return True
        going = (~self.stopped_N).any()
        return not bool(max_over_ranks(going.long()) if self.in_step else going)

    def draw(self, logits_NV: Tensor) -> Tensor:
        """One token for every row of the batch; rows that have ended get the pad id."""
        if not self.in_step:  # else the other ranks would wait in the next layer
            abort_if_asked()
        scores = (logits_NV.float() / self.temperature).index_fill(1, self.banned, float("-inf"))
        logp_NV = scores.log_softmax(-1)
        token = logp_NV.argmax(-1) if self.sampling.temperature == 0 else self._invert(logp_NV)
        ended = self.stopped_N[self.alive]
        token = token.masked_fill(ended, self.pad_id)
        self._record(token, logp_NV.gather(1, token[:, None])[:, 0].masked_fill(ended, 0.0), ended)
        return token

    def _invert(self, logp_NV: Tensor) -> Tensor:
        """The first token whose cumulative probability exceeds u; in float64, so that no token is out of reach."""
        cumulative = logp_NV.exp().cumsum(-1, dtype=torch.float64)
        u = uniforms(self.seeds_N[self.alive], self.step)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, u, right=True).clamp(max=logp_NV.shape[1] - 1)[:, 0]

    def _record(self, token: Tensor, logp: Tensor, ended: Tensor) -> None:
        self.ids_NT[self.alive, self.step] = token
        self.logp_NT[self.alive, self.step] = logp
        self.length_N[self.alive] += (~ended).long()
        self.stopped_N[self.alive] = ended | torch.isin(token, self.stops)
        self.step += 1

    def drop_finished(self) -> Tensor | None:
        """Positions of the rows to go on with once most have ended; None while shrinking the batch does not pay."""
        going = (~self.stopped_N[self.alive]).nonzero()[:, 0]
        if len(going) * 2 > len(self.alive) or not len(going):  # another rank's answers may go on
            return None
        self.alive = self.alive[going]
        return going

    def force(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor: makes a greedy ``generate`` emit the token drawn here."""
        token = self.draw(scores)
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)

    def result(self) -> tuple[Sequence[Tensor], Sequence[Tensor], list[bool]]:
        """Of every row, on the host and without padding: ids and log-probs drawn, and whether it met an end."""
        lengths = self.length_N.tolist()
        drawn_NT = torch.arange(self.sampling.max_tokens, device=self.length_N.device) < self.length_N[:, None]
        ids, logp = self.ids_NT[drawn_NT].cpu(), self.logp_NT[drawn_NT].cpu()
        return ids.split(lengths), logp.split(lengths), self.stopped_N.tolist()


def _expandable(policy: Policy) -> bool:
    """True where the cache holds plain keys and values and positions are known: the prompt can be read once a group."""
    return policy.family.causal


@contextmanager
def _evaluating(policy: Policy) -> Iterator[None]:
    """Evaluation mode for the time of a rollout: gradient checkpointing would switch the cache off."""
    was_training = policy.training
    if was_training:  # not for nothing: it visits every module
        policy.eval()
    try:
        yield
    finally:
        if was_training:
            policy.train()
