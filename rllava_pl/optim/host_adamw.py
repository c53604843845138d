"""AdamW on the host for weights on an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rllava_pl.functional.rounding import TABLE_SIZE, noise_table, on_bfloat16_grid, sample_noise
from rllava_pl.optim.gradients import HostGradients
from rllava_pl.optim.states import BFloat16, BlockQuantized, Float32, StateTensor
from rllava_pl.optim.transfer import spans, transfer_for

CHUNK = TABLE_SIZE
"""Numbers updated at a time: few enough for the cache of a core, many enough to make call overhead negligible."""
Precision = Literal["float32", "bfloat16", "int8"]
_MOMENTS: dict[str, tuple[Callable[[int], StateTensor], Callable[[int], StateTensor]]] = {
    "float32": (Float32.zeros, Float32.zeros),
    "bfloat16": (BFloat16, BFloat16),
    "int8": (partial(BlockQuantized, signed=True), partial(BlockQuantized, signed=False)),
}


class HostState:
    """State of one parameter on the host.

    Neither a mapping nor a dataclass, because Lightning moves the tensors in those to the accelerator.
    """

    def __init__(self, parts: dict[str, StateTensor]) -> None:
        self.step = torch.zeros((), device="cpu")
        self.parts = parts

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a checkpoint; not copies."""
        named = {f"{name}{suffix}": x for name, part in self.parts.items() for suffix, x in part.tensors.items()}
        return {"step": self.step, **named}

    def restore(self, tensors: dict[str, Tensor], states: str) -> None:
        """Restore what ``tensors()`` returned; another precision or model raises ``ValueError``."""
        kept = {name: (x.dtype, x.shape) for name, x in self.tensors().items()}
        found = {name: (x.dtype, x.shape) for name, x in tensors.items()}
        if kept != found:
            name = next(name for name in {**kept, **found} if kept.get(name) != found.get(name))
            raise ValueError(
                f"optimizer state {name!r} of the checkpoint is {_described(found.get(name))}, but states: {states} "
                f"needs {_described(kept.get(name))}; resume with the same `states` and dtype of the weights"
            )
        self.step = tensors["step"]
        for name, part in self.parts.items():
            part.tensors = {suffix: tensors[f"{name}{suffix}"] for suffix in part.tensors}


class HostAdamW(Optimizer):
    r"""AdamW (arXiv 1711.05101) with gradients, moments and fp32 master weights in host memory.

    The accelerator holds the weights and single gradients: each is added to its sum on the host as soon as backward has
    computed it, and ``p.grad`` is None. The step runs on the CPU (torch's fused kernel), and the new weights are copied
    back. For one process only, because ranks exchange gradients through ``p.grad``.

    With ``states="float32"`` the result equals ``torch.optim.AdamW(fused=True)`` on the same CPU, bit by bit.

    ============ ============== ============== =================== ==========================================
    ``states``   master weights moments        bytes a parameter   result
    ============ ============== ============== =================== ==========================================
    float32      fp32           fp32, fp32     12                  AdamW
    bfloat16     fp32           bf16, bf16     8                   AdamW, moments rounded stochastically
    int8         none           8 bits each    2.03                bf16 weights rounded stochastically as well
    ============ ============== ============== =================== ==========================================

    The sums of gradients need 4 or 2 bytes more. fp32 weights on a CPU need no master weights: 4 bytes less.

    Args:
        params: Parameters or parameter groups, in fp32 or bf16.
        lr: Learning rate.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay: a step first scales the weights by 1 - lr * weight_decay.
        states: Precision of moments and master weights, see the table: "float32", "bfloat16" or "int8".
        gradients: Precision of the sums: "float32", or "bfloat16", which rounds at every micro-batch.

    Raises:
        ValueError: A parameter is neither fp32 nor bf16, or not contiguous.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: Precision = "float32",
        gradients: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if states not in _MOMENTS:
            raise ValueError(f"states is {states!r}; it is one of {', '.join(_MOMENTS)}")
        self.precisions = {"states": states, "gradients": gradients}
        self._transfer = cache(transfer_for)
        self._gradients = HostGradients(self._transfer, getattr(torch, gradients))
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, and take their gradients from now on."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            shape = tuple(p.shape)
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"HostAdamW updates weights in float32 or bfloat16; one of shape {shape} is {p.dtype}")
            if not p.is_contiguous():
                raise ValueError(f"HostAdamW needs contiguous weights; one of shape {shape} has strides {p.stride()}")
            if p.requires_grad:
                self._gradients.watch(p)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, in ``p.grad`` and on the host."""
        super().zero_grad()
        self._gradients.clear()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global L2 norm of at most ``max_norm``, in place of torch's function.

        Returns:
            The norm before, 0-dim, on the device of the weights.
        """
        self._gradients.finish(self._parameters())
        return self._gradients.clip(self._parameters(), max_norm).to(self.param_groups[0]["params"][0].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self._gradients.finish(self._parameters())
        groups = ((p, group) for group in self.param_groups for p in group["params"])
        for index, (p, group) in enumerate(groups):
            if (gradient := self._gradients.get(p)) is not None:
                self._update(p, gradient, group, index)
        for device in {p.device for p in self._parameters()}:
            self._transfer(device).flush()
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any], index: int) -> None:
        """One step of one parameter, in chunks."""
        state = self._state(p)
        state.step = state.step + 1
        seed = (index, int(state.step))
        weights, transfer = p.detach().view(-1), self._transfer(p.device)
        options = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        for span in spans(p.numel(), CHUNK):
            target = weights[span]
            parts = {name: part.read(span) for name, part in state.parts.items()}
            weight = parts["master"] if "master" in parts else transfer.read(target).float()
            scaled = self._gradients.scaled(gradient[span])
            moments = [parts["exp_avg"]], [parts["exp_avg_sq"]]
            torch._fused_adamw_([weight], [scaled], *moments, [], [state.step], **options)
            for name, part in state.parts.items():
                part.write(span, parts[name], (name, *seed))
            if "master" not in parts and p.dtype == torch.bfloat16:
                noise = sample_noise(noise_table(16), span.start, len(weight), "weight", *seed)
                weight = on_bfloat16_grid(weight, noise)
            transfer.write(weight, target)

    def _state(self, p: Tensor) -> HostState:
        """The state of a parameter, made at its first step."""
        if p not in self.state:
            first, second = _MOMENTS[self.precisions["states"]]
            parts = {"exp_avg": first(p.numel()), "exp_avg_sq": second(p.numel())}
            is_own_master = p.dtype == torch.float32 and p.device.type == "cpu"
            if self.precisions["states"] != "int8" and not is_own_master:
                parts["master"] = Float32(p.detach().to("cpu").float().view(-1))
            self.state[p] = HostState(parts)
        return self.state[p]

    def _parameters(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    def state_dict(self) -> dict[str, Any]:
        """The state in plain tensors on the host, not copies."""
        packed = super().state_dict()
        packed["state"] = {index: state.tensors() for index, state in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint; its tensors are used without a copy.

        Raises:
            ValueError: The checkpoint has other ``states``, another dtype of the weights, or another model.
        """
        # Without the state, which torch would cast to the dtype of the weights.
        super().load_state_dict({**state_dict, "state": {}})
        for index, p in enumerate(self._parameters()):
            if index in state_dict["state"]:
                self._state(p).restore(state_dict["state"][index], self.precisions["states"])


def _described(kind: tuple[torch.dtype, torch.Size] | None) -> str:
    return "absent" if kind is None else f"{kind[0]} of shape {tuple(kind[1])}".replace("torch.", "")
