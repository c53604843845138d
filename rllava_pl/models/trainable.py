"""Frozen parameters, LoRA adapters, and the stream of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rllava_pl.models.families import family_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters W + (alpha / r)·B·A on linear layers (arXiv 2106.09685), through peft.

    There is no dropout: it would make the policy that is updated differ from the one that sampled.

    Args:
        r: Rank.
        alpha: Scale; the update is multiplied by alpha / r.
        target_modules: Globs of module names; by default every linear layer of the language model.
    """

    r: int = 16
    alpha: int = 32
    target_modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r is {self.r}; the rank must be at least 1")


def add_lora(model: PreTrainedModel, lora: LoRA) -> None:
    """Inject adapters in place; everything but the adapters is frozen.

    Raises:
        ValueError: A glob of ``target_modules`` matches no linear layer.
    """
    from peft import LoraConfig

    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if lora.target_modules:
        targets = {name for glob in lora.target_modules for name in _matches(glob, linear, "lora.target_modules")}
    else:
        decoder = {id(module) for module in model.get_decoder().modules()}
        targets = {name for name in linear if id(model.get_submodule(name)) in decoder}
    model.add_adapter(LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=sorted(targets)))


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Stop training the parameters that match.

    Args:
        model: Changed in place.
        patterns: Globs of parameter names, or the names ``vision_tower``, ``connector``, ``language_model``,
            ``embeddings``.

    Raises:
        ValueError: A pattern matches no parameter.
    """
    names, family = {name for name, _ in model.named_parameters()}, family_of(model)
    for pattern in patterns:
        if pattern in ("language_model", "embeddings"):
            part = model.get_decoder() if pattern == "language_model" else model.get_input_embeddings()
            part.requires_grad_(False)
            continue
        glob = {"vision_tower": family.vision_tower, "connector": family.connector}.get(pattern, pattern)
        without = family.connector if pattern == "vision_tower" else ""
        for name in _matches(pattern, names, "freeze", glob, without):
            model.get_parameter(name).requires_grad_(False)


def frozen_names(module: nn.Module) -> set[str]:
    """Names in the ``state_dict`` of what is not trained."""
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return set(module.state_dict()) - trained


def _matches(pattern: str, names: set[str], option: str, glob: str = "", without: str = "") -> set[str]:
    """The names that match a pattern, or the glob that it stands for, and not ``without``; at least one."""
    found = {name for name in names if fnmatchcase(name, glob or pattern) and not fnmatchcase(name, without)}
    if not found:
        examples = ", ".join(sorted(names)[:3])
        raise ValueError(f"{option}: {pattern!r} matches nothing; names of this model look like {examples}, ...")
    return found


def hf_weights(
    model: PreTrainedModel, full: Callable[[Tensor], Tensor] = Tensor.detach
) -> Iterator[tuple[str, Tensor]]:
    """Stream ``(name, tensor)`` of the whole model as its ``state_dict`` names it, one tensor at a time.

    Adapters are merged on the fly (W + scaling·B·A) without touching the trained weights; tied heads appear under both
    names, because engines that pack the head separately need it.

    Args:
        model: With or without adapters.
        full: Gathers a parameter that is sharded; by default the parameter as it is.
    """
    adapted = {id(module.base_layer): module for module in model.modules() if hasattr(module, "lora_A")}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if ".lora_" in prefix:
            continue
        parts = [part for part in prefix.split(".") if part and part not in _WRAPPERS]
        hidden = module._non_persistent_buffers_set
        buffers = {name: buffer for name, buffer in module._buffers.items() if name not in hidden}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is None:
                continue
            weight = full(tensor)
            if name == "weight" and id(module) in adapted:
                weight = _merged(weight, adapted[id(module)], full)
            yield ".".join([*parts, name]), weight
            del weight  # else it would stay in memory while the next one is gathered


def _merged(weight: Tensor, layer: LoraLayer, full: Callable[[Tensor], Tensor]) -> Tensor:
    """W + scaling·B·A as a new tensor; no other tensor of that size is made in float32."""
    (adapter,) = layer.active_adapters
    a, b = full(layer.lora_A[adapter].weight), full(layer.lora_B[adapter].weight)
    change = (b.float() @ a.float()).mul_(layer.scaling[adapter])
    return change.to(weight.dtype).add_(weight)


_WRAPPERS = {"base_layer", "_fsdp_wrapped_module"}
"""Attributes under which adapters and FSDP keep the wrapped module."""
