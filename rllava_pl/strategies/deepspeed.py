"""DeepSpeed's ZeRO: optimizer states (1), gradients (2) and weights (3) in equal parts, on the GPU or on the host."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from rllava_pl.distributed.collectives import rank
from rllava_pl.distributed.shards import Piece, even_bounds, gatherer
from rllava_pl.models.trainable import hf_weights
from rllava_pl.strategies import adapter as updates
from rllava_pl.strategies.ddp import RLStrategyMixin
from rllava_pl.strategies.sharding import CheckpointDirectory

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedModel

TAG = "zero"
"""Directory of DeepSpeed's files within a checkpoint."""


class RLDeepSpeedStrategy(RLStrategyMixin, CheckpointDirectory, DeepSpeedStrategy):
    """ZeRO (arXiv 1910.02054): ``stage`` says what is kept in parts, the offloads what waits in host memory.

    Args:
        stage: 1: optimizer states in parts; 2: gradients as well; 3: weights as well.
        offload_optimizer: Optimizer states, and the step itself, on the host. With torch's AdamW it is slow; take
            ``deepspeed.ops.adam.DeepSpeedCPUAdam``.
        offload_parameters: Weights wait on the host until their layer runs; stage 3 only.
        pin_memory: Offload to page-locked memory: faster copies, but memory that can no longer be swapped.
        overlap_comm: Exchange gradients while the backward pass goes on.
        reduce_bucket_size: Elements exchanged at a time.
        prefetch_bucket_size: Stage 3: elements gathered ahead of the layer that needs them.
        param_persistence_threshold: Stage 3: parameters with fewer elements stay whole on every rank.
        max_live_parameters: Stage 3: gathered elements kept at a time.
        sub_group_size: Stage 3: elements updated at a time.
        allow_cpu: Run on CPU processes; for tests. Set ``DS_ACCELERATOR=cpu`` in the environment.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 3,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        pin_memory: bool = True,
        overlap_comm: bool = True,
        reduce_bucket_size: int = 200_000_000,
        prefetch_bucket_size: int = 50_000_000,
        param_persistence_threshold: int = 100_000,
        max_live_parameters: int = 1_000_000_000,
        sub_group_size: int = 1_000_000_000,
        allow_cpu: bool = False,
    ) -> None:
        if offload_parameters and stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, where weights are kept in parts; the stage is {stage}")
        host = {"device": "cpu", "pin_memory": pin_memory and not allow_cpu}
        zero: dict[str, object] = {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": overlap_comm and not allow_cpu,
            "reduce_bucket_size": reduce_bucket_size,
            "sub_group_size": sub_group_size,
        }
        if stage == 3:
            zero["stage3_prefetch_bucket_size"] = prefetch_bucket_size
            zero["stage3_param_persistence_threshold"] = param_persistence_threshold
            zero["stage3_max_live_parameters"] = max_live_parameters
        if offload_optimizer:
            zero["offload_optimizer"] = host
        if offload_parameters:
            zero["offload_param"] = host
        super().__init__(
            config={
                "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log of speed, which nobody reads
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW is slow, not wrong
                "zero_optimization": zero,
            },
            exclude_frozen_parameters=True,
        )
        self.stage, self.allow_cpu = stage, allow_cpu
        self._engine: Any = None

    def setup_environment(self) -> None:
        """As usual, where there are GPUs or CPUs will do."""
        updates.check_accelerator(self, self.allow_cpu)
        super(DeepSpeedStrategy, self).setup_environment()  # stock code takes nothing but CUDA

    def setup_distributed(self) -> None:
        """As usual; CPUs have no device index to check."""
        if self.accelerator.name() != "cpu":  # type: ignore[attr-defined]
            return super().setup_distributed()
        import deepspeed
        from lightning.fabric.utilities.seed import reset_seed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or each machine compiles it before it starts
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _init_config_if_needed(self) -> None:
        """Gradients are clipped by DeepSpeed's step, to the norm the module wants."""
        self.config["gradient_clipping"] = self.lightning_module.max_grad_norm
        super()._init_config_if_needed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let ``from_pretrained`` cut weights as it reads them; all else is built whole and cut later.

        Under Lightning's own ``zero.Init`` new layers (adapters, a value head) would be cut before they are
        initialised, and so keep other values than they should.
        """
        self._init_config_if_needed()
        if not self.zero_stage_3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        known = HfDeepSpeedConfig(self.config)  # transformers holds it weakly: it is known as long as this block lasts
        yield
        del known

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRScheduler | None = None
    ) -> tuple[Any, Optimizer]:
        """As usual, on CPUs too, where stock code would pass no rank."""
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"model_parameters": trained, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        return self._initialize(model, self.config, **options)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """An engine without optimizer, or the one that a fit has left: its weights are cut already."""
        if self._engine is None:
            needed = {"train_micro_batch_size_per_gpu", "bf16", *(["zero_optimization"] if self.stage == 3 else [])}
            self._initialize(model, {key: x for key, x in self.config.items() if key in needed}, model_parameters=[])
        self.model = self._engine

    def _initialize(self, model: nn.Module, config: dict[str, Any], **options: object) -> tuple[Any, Any]:
        import deepspeed

        if "bf16" in config:  # weights were cut in bfloat16 as they were read; what was built beside them must agree
            for parameter in model.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.bfloat16()
        rank = argparse.Namespace(device_rank=self.local_rank)
        self._engine, optimizer, *_ = deepspeed.initialize(
            args=rank, model=model, config=config, dist_init_required=False, **options
        )
        return self._engine, optimizer

    def save_shards(self, directory: Path) -> None:
        """DeepSpeed's own files, without frozen weights."""
        self.deepspeed_engine.save_checkpoint(str(directory), tag=TAG, exclude_frozen_parameters=True)

    def load_shards(self, directory: Path, *, optimizers: bool) -> None:
        """As DeepSpeed does, but reading nothing except tensors and plain types."""
        if not (directory / TAG).is_dir():
            raise ValueError(f"{directory} was not saved by {type(self).__name__}: it holds no {TAG}")
        with _weights_only():
            self.deepspeed_engine.load_checkpoint(
                str(directory),
                tag=TAG,
                load_module_strict=False,
                load_optimizer_states=optimizers,
                load_lr_scheduler_states=False,
            )


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every ``torch.load`` refuse pickled code, also where DeepSpeed asks for anything."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


StrategyRegistry.register(
    "rl_deepspeed", RLDeepSpeedStrategy, description="DeepSpeed ZeRO for steps with many forwards"
)


@updates.check.register(RLDeepSpeedStrategy)
def _(strategy: RLDeepSpeedStrategy) -> None:
    """Right: it is told before each micro-batch whether it is the last."""


@updates.micro_batch.register(RLDeepSpeedStrategy)
def _(strategy: RLDeepSpeedStrategy, *, last: bool) -> AbstractContextManager[None]:
    strategy.deepspeed_engine.set_gradient_accumulation_boundary(last)
    return nullcontext()


@updates.clip_gradients.register(RLDeepSpeedStrategy)
def _(strategy: RLDeepSpeedStrategy, optimizer: ZeROOptimizer, max_norm: float) -> Tensor:
    """The norm of the gradients that DeepSpeed has averaged; its step will clip by the same norm, taken again."""
    from deepspeed.runtime.utils import combine_grad_norm_groups

    if strategy.stage == 3:
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    else:
        norm = optimizer.scaled_global_norm()
    norm = norm.to(strategy.root_device)
    return torch.where(norm < 0, torch.nan, norm)  # -1 is DeepSpeed's word for "not finite"


@updates.discard_gradients.register(RLDeepSpeedStrategy)
def _(strategy: RLDeepSpeedStrategy, optimizer: ZeROOptimizer) -> None:
    """What DeepSpeed's own step does to gradients when it finds an overflow."""
    if strategy.stage == 3:
        optimizer._pre_step()
        optimizer._overflow_clean_up(optimizer.loss_scale)
        return
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    optimizer.zero_grad(set_to_none=True)
    optimizer._release_preflattened_grad_buffers()
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
    for buffers in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        buffers.update(dict.fromkeys(buffers))


@updates.full_weights.register(RLDeepSpeedStrategy)
def _(strategy: RLDeepSpeedStrategy, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    cut = {id(p): _piece(p) for p in model.parameters() if hasattr(p, "ds_tensor")}
    return hf_weights(model, gatherer(cut, strategy.root_device))


def _piece(p: Tensor) -> Piece:
    """Stage 3 cuts the flattened parameter into equal runs and pads the last, also where it keeps a whole one too."""
    own, size = p.ds_tensor, p.ds_numel  # type: ignore[attr-defined]
    bounds = even_bounds(size, own.ds_numel)
    return Piece(own.detach().flatten()[: bounds[rank() + 1] - bounds[rank()]], bounds, p.ds_shape)  # type: ignore[attr-defined]


@updates.in_step.register(RLDeepSpeedStrategy)
def _(strategy: RLDeepSpeedStrategy) -> bool:
    return strategy.stage == 3
