"""The embedded engine: samples with the trainer's own weights, on any device, with nothing to synchronise.

Each prompt is read once and its cache expanded to the group; then one token at a time is drawn for all rows. The
log-probs are those of exactly the distribution that is trained (temperature, banned tokens), so in fp32 they are the
old log-probs and no second pass is needed.

Randomness is a function of counters: row n draws its t-th token with the uniform number u(seed_n, t) by inverting the
cumulative distribution, so a sample depends on its seed alone and not on what else is in the batch. Tokens given with
a request (``prefix_ids``) are read with the prompt and draw no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rllava_pl.distributed.collectives import max_over_ranks
from rllava_pl.distributed.signals import abort_if_signalled
from rllava_pl.functional.seeds import uniforms
from rllava_pl.models.encoding import extend
from rllava_pl.models.policy import Policy, next_positions
from rllava_pl.rollout.common import BatchEngine
from rllava_pl.types import Generation, PromptInputs, Request, Sampling


class TransformersEngine(BatchEngine):
    """Samples with the policy itself.

    Args:
        policy: The trained one; its weights are read at every call.
        batch_prompts: Prompts sampled at a time; bounds the memory of the cache.
        unsharded: Context in which the policy's model may be called, for strategies that shard it.
        lockstep: Whether every call of a layer is a call on all ranks, as for sharded models. All ranks then make the
            same number of calls: those with fewer prompts or shorter responses compute rows that are not used.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        batch_prompts: int = 64,
        unsharded: Callable[[], AbstractContextManager[None]] = nullcontext,
        lockstep: bool = False,
    ) -> None:
        if batch_prompts < 1:
            raise ValueError(f"batch_prompts is {batch_prompts}; at least one prompt must be sampled at a time")
        super().__init__(policy)
        self.batch_prompts = batch_prompts
        self.unsharded = unsharded
        self.lockstep = lockstep

    @property
    def exact(self) -> bool:
        """True in fp32 without autocast: sampling and training then agree to rounding."""
        return self.policy.model.dtype == torch.float32 and not torch.is_autocast_enabled(self.policy.device.type)

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Complete every request once a seed; see ``BatchEngine``."""
        generations: list[Generation] = []
        policy, size = self.policy, self.batch_prompts
        training = policy.training
        if training:
            policy.eval()  # gradient checkpointing would switch the cache off
        try:
            with self.unsharded(), torch.no_grad():
                batches = -(-len(requests) // size)
                if self.lockstep:  # as many batches on every rank, the last ones empty
                    batches = int(max_over_ranks(torch.tensor(batches, device=policy.device)))
                for start in range(0, batches * size, size):
                    generations += self._complete(requests[start : start + size], sampling, len(generations))
        finally:
            if training:
                policy.train()
        return generations

    def sync(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Nothing to copy: the engine reads the trained weights themselves."""
        self.version = version

    def _complete(self, requests: Sequence[Request], sampling: Sampling, handle: int) -> list[Generation]:
        """One batch; a rank without requests computes a row that is not used."""
        row_of_N = [p for p, request in enumerate(requests) for _ in request.seeds] or [0]
        seeds = [seed for request in requests for seed in request.seeds] or [0]
        sampler = _Sampler(self.policy, sampling, torch.tensor(seeds, device=self.policy.device), self.lockstep)
        contexts = [extend(r.inputs, r.prefix_ids) if r.prefix_ids else r.inputs for r in requests]
        contexts = contexts or [self.policy.dummy_prompt]
        if self.policy.model_family.causal:  # the cache holds plain keys and values: a prompt is read once a group
            self._decode(contexts, torch.tensor(row_of_N, device=self.policy.device), sampler)
        else:
            self._generate([contexts[p] for p in row_of_N], sampler)
        if not requests:
            return []
        return [
            Generation(
                handle=handle + n,
                prompt_ids=requests[p].inputs.input_ids_S,
                ids_T=ids,
                logprobs_T=logp,
                finish_reason="stop" if stopped else "length",
                weight_version=self.version,
            )
            for n, (p, ids, logp, stopped) in enumerate(zip(row_of_N, *sampler.result(), strict=True))
        ]

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
        """The model's own ``generate``, for families whose cache cannot be expanded: reads the prompt once a sample."""
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
            synced_gpus=self.lockstep,
        )


class _Sampler:
    """Draws one token a row at a time; keeps ids, log-probs and which rows have ended."""

    def __init__(self, policy: Policy, sampling: Sampling, seeds_N: Tensor, lockstep: bool = False) -> None:
        self.sampling = sampling
        self.lockstep = lockstep
        self.temperature = sampling.temperature or policy.temperature
        """Of the log-probs: those of a greedy response are the policy's, as the trainer scores it."""
        self.seeds_N = seeds_N
        self.banned = torch.tensor(policy.banned_ids, dtype=torch.int64, device=policy.device)
        self.stops = torch.tensor(policy.stop_ids, device=policy.device)
        self.pad_id = policy.pad_id
        self.ids_NT = torch.zeros(len(seeds_N), sampling.max_tokens, dtype=torch.int64, device=policy.device)
        self.logp_NT = torch.zeros_like(self.ids_NT, dtype=torch.float32)
        self.length_N = torch.zeros_like(self.ids_NT[:, 0])
        self.stopped_N = torch.zeros_like(self.length_N, dtype=torch.bool)
        self.alive = torch.arange(len(seeds_N), device=policy.device)
        """Rows that are still in the batch; some of them may have ended."""
        self.step = 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to draw on this rank, in lockstep on any rank; then collective."""
        if self.step == self.sampling.max_tokens:
            return True
        unfinished = (~self.stopped_N).any()
        return not bool(max_over_ranks(unfinished.long()) if self.lockstep else unfinished)

    def draw(self, logits_NV: Tensor) -> Tensor:
        """One token for every row of the batch; rows that have ended get the pad id."""
        if not self.lockstep:  # else the other ranks would wait in the next layer
            abort_if_signalled()
        scores = (logits_NV.float() / self.temperature).index_fill(1, self.banned, float("-inf"))
        logp_NV = scores.log_softmax(-1)
        if self.sampling.temperature == 0:
            token = logp_NV.argmax(-1)
        else:  # the first token whose cumulative probability exceeds u; in float64, so that every token can be drawn
            cumulative = logp_NV.exp().cumsum(-1, dtype=torch.float64)
            u = uniforms(self.seeds_N[self.alive], self.step)[:, None] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, u, right=True).clamp(max=logp_NV.shape[1] - 1)[:, 0]
        ended = self.stopped_N[self.alive]
        token = token.masked_fill(ended, self.pad_id)
        self.ids_NT[self.alive, self.step] = token
        self.logp_NT[self.alive, self.step] = logp_NV.gather(1, token[:, None])[:, 0].masked_fill(ended, 0.0)
        self.length_N[self.alive] += (~ended).long()
        self.stopped_N[self.alive] = ended | torch.isin(token, self.stops)
        self.step += 1
        return token

    def drop_finished(self) -> Tensor | None:
        """Positions of the rows to keep once half of them have ended; None while shrinking the batch does not pay."""
        kept = (~self.stopped_N[self.alive]).nonzero()[:, 0]
        if len(kept) * 2 > len(self.alive) or not len(kept):  # another rank's responses may be unfinished
            return None
        self.alive = self.alive[kept]
        return kept

    def force(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As a logits processor: makes a greedy ``generate`` emit the token drawn here."""
        token = self.draw(scores)
        return torch.full_like(scores, float("-inf")).scatter(1, token[:, None], 0.0)

    def result(self) -> tuple[Sequence[Tensor], Sequence[Tensor], list[bool]]:
        """Of every row, on the host and without padding: ids and log-probs drawn, and whether an end token came."""
        lengths = self.length_N.tolist()
        drawn_NT = torch.arange(self.sampling.max_tokens, device=self.length_N.device) < self.length_N[:, None]
        ids, logp = self.ids_NT[drawn_NT].cpu(), self.logp_NT[drawn_NT].cpu()
        return ids.split(lengths), logp.split(lengths), self.stopped_N.tolist()
