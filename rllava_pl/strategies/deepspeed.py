"""DeepSpeed's ZeRO: shards optimizer states (1), gradients (2) and weights (3), on the GPU or on the host."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from rllava_pl.checkpoint.codec import Plain
from rllava_pl.distributed.collectives import rank
from rllava_pl.distributed.shards import Shard, even_bounds
from rllava_pl.strategies.adapter import adapter_for
from rllava_pl.strategies.sharding import ShardedAdapter, ShardedStrategy

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from torch.optim.lr_scheduler import LRScheduler

TAG = "zero"
"""Directory of DeepSpeed's files within a checkpoint."""


class DeepSpeedAdapter(ShardedAdapter):
    """ZeRO, all stages."""

    strategy: RLDeepSpeedStrategy

    @property
    def lockstep(self) -> bool:
        """Stage 3 gathers the weights of a layer whenever it runs."""
        return self.strategy.stage == 3

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """DeepSpeed must know before the forward whether the micro-batch is the last of an update."""
        self.strategy.deepspeed_engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def clip_grad_norm(self, optimizer: Optimizer, max_norm: float) -> Tensor:
        """The norm of the gradients that DeepSpeed has averaged; its step computes it again, and clips by it."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = cast("ZeROOptimizer", optimizer)
        stage_3 = self.strategy.stage == 3
        norm = combine_grad_norm_groups(zero._get_norm_groups()) if stage_3 else zero.scaled_global_norm()
        norm = norm.to(self.strategy.root_device)
        return torch.where(norm < 0, torch.nan, norm)  # -1 means "not finite"

    def discard_gradients(self, optimizer: Optimizer) -> None:
        """What DeepSpeed's own step does to gradients when it finds an overflow."""
        zero = cast("ZeROOptimizer", optimizer)
        if self.strategy.stage == 3:
            zero._pre_step()
            zero._overflow_clean_up(zero.loss_scale)
            return
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        zero.micro_step_id = INITIAL_MICRO_STEP_ID
        zero.zero_grad(set_to_none=True)
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        for buffers in (zero.averaged_gradients, zero.all_grad_tensors):
            buffers.update(dict.fromkeys(buffers))


class RLDeepSpeedStrategy(ShardedStrategy, DeepSpeedStrategy):
    """ZeRO (arXiv 1910.02054): ``stage`` says what is sharded, the offload options what is kept in host memory.

    Args:
        stage: 1: optimizer states are sharded; 2: gradients as well; 3: weights as well.
        offload_optimizer: Keep optimizer states on the host and make the step there. With torch's AdamW it is slow; use
            ``deepspeed.ops.adam.DeepSpeedCPUAdam``.
        offload_parameters: Keep weights on the host until their layer runs; stage 3 only.
        pin_memory: Offload to page-locked memory: faster copies, but memory that cannot be swapped.
        overlap_comm: Exchange gradients during the backward pass.
        reduce_bucket_size: Elements exchanged at a time.
        prefetch_bucket_size: Stage 3: elements gathered ahead of the layer that needs them.
        param_persistence_threshold: Stage 3: parameters with fewer elements are not sharded.
        max_live_parameters: Stage 3: gathered elements kept at a time.
        sub_group_size: Stage 3: elements updated at a time.
        allow_cpu: Run on CPU processes; for tests. Set ``DS_ACCELERATOR=cpu`` in the environment.
    """

    adapter_class = DeepSpeedAdapter

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
            raise ValueError(f"offload_parameters needs stage 3, where weights are sharded; the stage is {stage}")
        host = {"device": "cpu", "pin_memory": pin_memory and not allow_cpu}
        zero = {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": overlap_comm and not allow_cpu,
            "reduce_bucket_size": reduce_bucket_size,
            "sub_group_size": sub_group_size,
            "offload_optimizer": host if offload_optimizer else None,
            "offload_param": host if offload_parameters else None,
            "stage3_prefetch_bucket_size": prefetch_bucket_size if stage == 3 else None,
            "stage3_param_persistence_threshold": param_persistence_threshold if stage == 3 else None,
            "stage3_max_live_parameters": max_live_parameters if stage == 3 else None,
        }
        super().__init__(
            config={
                "train_micro_batch_size_per_gpu": 1,  # used by DeepSpeed's log of its throughput only
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # offload with torch's AdamW is slow, not wrong
                "zero_optimization": {key: x for key, x in zero.items() if x is not None},
            },
            exclude_frozen_parameters=True,
        )
        self.stage, self.allow_cpu = stage, allow_cpu
        self._engine: Any = None

    def setup_environment(self) -> None:
        """Refuse CPUs unless they are allowed, then as usual."""
        adapter_for(self).check()
        super(DeepSpeedStrategy, self).setup_environment()  # DeepSpeedStrategy's own accepts CUDA only

    def setup_distributed(self) -> None:
        """As usual; CPUs have no device index, which Lightning's own method checks."""
        if self.accelerator.name() != "cpu":  # type: ignore[attr-defined]
            return super().setup_distributed()
        import deepspeed
        from lightning.fabric.utilities.seed import reset_seed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at the start
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _init_config_if_needed(self) -> None:
        """DeepSpeed's step clips the gradients, to the norm that the module is configured with."""
        self.config["gradient_clipping"] = self.lightning_module.max_grad_norm
        super()._init_config_if_needed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let ``from_pretrained`` shard weights as it reads them; all other parameters are sharded later.

        Under Lightning's own ``zero.Init`` new layers (adapters, a value head) would be sharded before they are
        initialised, and get wrong values.
        """
        self._init_config_if_needed()
        if not self.zero_stage_3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        config = HfDeepSpeedConfig(self.config)  # transformers keeps a weak reference to it
        yield
        del config

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: LRScheduler | None = None
    ) -> tuple[Any, Optimizer]:
        """As usual, on CPUs too, where Lightning's own method passes no rank."""
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"model_parameters": trained, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        return self._initialize(model, self.config, **options)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """An engine without optimizer, or that of an earlier fit, whose weights are sharded already."""
        if self._engine is None:
            needed = {"train_micro_batch_size_per_gpu", "bf16", *(["zero_optimization"] if self.stage == 3 else [])}
            self._initialize(model, {key: x for key, x in self.config.items() if key in needed}, model_parameters=[])
        self.model = self._engine

    def _initialize(self, model: nn.Module, config: dict[str, Any], **options: object) -> tuple[Any, Any]:
        import deepspeed

        if "bf16" in config:  # weights that were read are sharded in bfloat16; all others must have the same dtype
            for parameter in model.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.bfloat16()
        rank = argparse.Namespace(device_rank=self.local_rank)
        self._engine, optimizer, *_ = deepspeed.initialize(
            args=rank, model=model, config=config, dist_init_required=False, **options
        )
        return self._engine, optimizer

    def reshard(self) -> None:
        """Nothing to do: DeepSpeed frees gathered weights after each layer."""

    def shards(self) -> dict[int, Shard]:
        """Stage 3 cuts the flattened parameter into equal ranges and pads the last; smaller stages shard no weights."""
        found = {}
        parameters: Iterable[Any] = self.lightning_module.parameters()  # DeepSpeed adds attributes to them
        for p in parameters:
            if hasattr(p, "ds_tensor"):
                local = p.ds_tensor
                bounds = even_bounds(p.ds_numel, local.ds_numel)
                length = bounds[rank() + 1] - bounds[rank()]
                found[id(p)] = Shard(local.detach().flatten()[:length], bounds, p.ds_shape)
        return found

    def save_shards(self, directory: Path) -> Plain:
        """DeepSpeed's own files, without frozen weights."""
        self.deepspeed_engine.save_checkpoint(str(directory), tag=TAG, exclude_frozen_parameters=True)
        return None

    def load_shards(self, directory: Path, plain: Plain, *, optimizers: bool) -> None:
        """As DeepSpeed does, on the number of ranks that saved it, but reading only tensors and plain types."""
        if not (directory / TAG).is_dir():
            raise ValueError(f"{directory} was not saved by {type(self).__name__}: it has no {TAG}")
        with _weights_only():
            which = {"load_optimizer_states": optimizers, "load_lr_scheduler_states": False}
            self.deepspeed_engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False, **which)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every ``torch.load`` refuse pickled code, also where DeepSpeed passes ``weights_only=False``."""
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


StrategyRegistry.register("rl_deepspeed", RLDeepSpeedStrategy, description="ZeRO for steps with many forwards")
