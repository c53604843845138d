"""Measured memory of every phase beside that of the memory plan."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console
from rich.table import Column, Table
from torch import nn

from rllava_pl.callbacks.plan_settings import placement_with, settings_of
from rllava_pl.memory import MemoryPlan, PromptSize, placement_of, plan
from rllava_pl.memory.units import gib
from rllava_pl.modules import PolicyModule
from rllava_pl.types import PromptBatch

PLANNED = {"rollout": ("rollout",), "logprobs": ("logprobs",), "update": ("update", "optimizer"), "save": ("save",)}
"""Phases of a run, and the phases of the plan that belong to them."""
log = logging.getLogger(__name__)


class MemoryReport(Callback):
    """Logs the peak of every phase as ``memory/<phase>_gib``, and the planned one as ``memory/predicted_<phase>_gib``.

    On a GPU the peak is that of torch's allocator plus all other memory in use at the end of the phase (context, an
    engine's memory). On a CPU (Linux) it is the growth of the process since the start of the first rollout, plus the
    weights that were loaded before; interpreter and libraries are not counted. The plan assumes that every response has
    ``sampling.max_tokens`` tokens and every prompt the length of the longest of the first rollout. Only rank 0 reports,
    and only the first of several reports in a run.

    Args:
        predict: Make the plan before the first rollout, which takes from a few seconds to a minute.
    """

    def __init__(self, predict: bool = True) -> None:
        self.predict = predict
        self.predicted: dict[str, float] = {}
        """GiB by phase."""
        self.measured: dict[str, float] = {}
        """Largest GiB by phase, of the whole run."""
        self._reports = False
        self._meter: CUDAMeter | ProcessMeter | None = None
        self._peaks: list[int] = []
        """Bytes of the phases that are running, outermost first."""
        self._recent: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe the phases."""
        observers = cast(PolicyModule, pl_module).phases.observers
        self._reports = trainer.is_global_zero and not any(isinstance(x, MemoryReport) for x in observers)
        if self._reports:
            observers.append(self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Before the first rollout, make the plan and start to measure."""
        if self._meter is not None or not self._reports:
            return
        module = cast(PolicyModule, pl_module)
        if self.predict:
            self.predicted = self._plan(trainer, module, cast(PromptBatch, batch))
        self._meter = meter(module)

    def phase_begins(self, name: str) -> None:
        """Measure this phase; the peak of the phase around it so far is kept."""
        if self._meter is not None:
            self._read(self._meter)
            self._peaks.append(0)

    def phase_ends(self, name: str, seconds: float) -> None:
        """Record the peak, also for the phase around it."""
        if self._meter is None or not self._peaks:
            return
        self._read(self._meter)
        peak = self._peaks.pop()
        self._recent[name] = max(self._recent.get(name, 0.0), gib(peak))
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], peak)

    def _read(self, meter: CUDAMeter | ProcessMeter) -> None:
        """Add the peak since the last reading to the innermost phase."""
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], meter.peak())
        meter.restart()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log the peaks of the rollout that has ended."""
        if not self._reports:
            return
        recent, self._recent = self._recent, {}
        self.measured |= {name: max(size, self.measured.get(name, 0.0)) for name, size in recent.items()}
        metrics = {f"memory/{name}_gib": size for name, size in recent.items()}
        metrics |= {f"memory/predicted_{name}_gib": self.predicted[name] for name in recent if name in self.predicted}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=cast(PolicyModule, pl_module).state.rollouts)
        trainer.callback_metrics.update({name: torch.tensor(size) for name, size in metrics.items()})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a table of all phases."""
        if not self._reports or not self.measured:
            return
        columns = (Column(name, justify="right") for name in ("measured", "predicted"))
        table = Table("phase", *columns, title="peak memory, GiB", title_justify="left")
        for name, size in self.measured.items():
            table.add_row(name, f"{size:.3f}", f"{self.predicted[name]:.3f}" if name in self.predicted else "")
        get_console().print(table)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop observing, also after an error."""
        observers = cast(PolicyModule, pl_module).phases.observers
        if self in observers:
            observers.remove(self)

    def _plan(self, trainer: Trainer, module: PolicyModule, batch: PromptBatch) -> dict[str, float]:
        """Predicted GiB by phase; empty, with a warning, if the run cannot be planned."""
        try:
            found = planned(trainer, module, batch)
        except Exception as error:  # a plan is optional: an error in it must not end the run
            log.warning("no memory plan: %s", error)
            return {}
        peaks = {phase.name: phase.gpu if found.settings.device == "cuda" else phase.host for phase in found.phases}
        planned_peaks = {name: [peaks[part] for part in parts if part in peaks] for name, parts in PLANNED.items()}
        return {name: gib(max(sizes)) for name, sizes in planned_peaks.items() if sizes}


def planned(trainer: Trainer, module: PolicyModule, batch: PromptBatch) -> MemoryPlan:
    """The plan of a run, from its Trainer, module and first batch."""
    strategy = trainer.strategy
    zero = getattr(strategy, "config", {}).get("zero_optimization", {})
    options = {
        "stage": zero.get("stage", 3),
        "offload_optimizer": "offload_optimizer" in zero,
        "offload_parameters": "offload_param" in zero,
        "reduce_bucket_size": zero.get("reduce_bucket_size", 0),
    }
    settings = settings_of(
        module,
        trainer.callbacks,  # type: ignore[attr-defined]
        placement=placement_with(placement_of(type(strategy).__name__, options), trainer.optimizers[0]),
        precision=str(trainer.precision),
        ranks=trainer.world_size,
        batch_prompts=len(batch),
        prompt=prompt_size(module, batch),
        device="cuda" if module.policy.device.type == "cuda" else "cpu",
    )
    return plan(settings, module.optimizer)


def prompt_size(module: PolicyModule, batch: PromptBatch) -> PromptSize:
    """The longest prompt of a batch, the most images of one, and the most tokens of an image."""
    config = module.policy.model.config
    image_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    inputs, images = module.policy.encode(list(batch)), [len(prompt.images) for prompt in batch]
    image_tokens = (
        int((x.input_ids_S == image_id).sum()) / max(1, n) if image_id is not None else 0
        for x, n in zip(inputs, images, strict=True)
    )
    return PromptSize(max(len(x) for x in inputs), max(images), max(1, round(max(image_tokens))))


def meter(module: nn.Module) -> CUDAMeter | ProcessMeter:
    """The meter of the device that trains."""
    if any(p.is_cuda for p in module.parameters()):
        return CUDAMeter()
    maps = Path("/proc/self/maps")
    lines = [line.split() for line in maps.read_text().splitlines()] if maps.exists() else []
    ends = (line[0].split("-") for line in lines if line[4] != "0")
    files = [range(int(start, 16), int(end, 16)) for start, end in ends]  # addresses of mapped files
    own = (p for p in module.parameters() if not (p.requires_grad and any(p.data_ptr() in file for file in files)))
    return ProcessMeter(loaded=sum(p.nbytes for p in own))


class CUDAMeter:
    """Peak since the last restart of torch's allocator, and all other memory in use on the GPU."""

    def restart(self) -> None:
        """Forget the peak."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes."""
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        return others + torch.cuda.max_memory_reserved()


class ProcessMeter:
    """Peak since the last restart of the growth of this process (Linux), without pages of files.

    Freed memory that the C library keeps is returned to the system at every restart, since later phases would reuse it.

    Args:
        loaded: Bytes of weights that were loaded before and count. Trained weights that are still pages of their file
            are not among them: they count from the first update on, which writes them.
    """

    STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __init__(self, loaded: int = 0) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if self.CLEAR.exists() else None
        self.restart()
        self.base = self._own("VmRSS") - loaded

    def restart(self) -> None:
        """Forget the peak."""
        if self._trim is not None:
            self._trim(0)
        if self.CLEAR.exists():
            self.CLEAR.write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)

    def peak(self) -> int:
        """Bytes."""
        return self._own("VmHWM") - self.base

    def _own(self, total: str) -> int:
        """Bytes of ``total`` that are not pages of files, such as libraries; 0 on systems without ``/proc``."""
        if not self.STATUS.exists():
            return 0
        sizes = dict(line.split(":", 1) for line in self.STATUS.read_text().splitlines())
        return 1024 * (int(sizes[total].split()[0]) - int(sizes["RssFile"].split()[0]))
