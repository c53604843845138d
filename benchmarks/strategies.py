"""Memory of every strategy on two CPU processes: loading, what a rank holds, and streaming the full weights.

    python benchmarks/strategies.py --strategies rl_ddp rl_fsdp2 rl_deepspeed_3 --width 512 --layers 8

The model is an idefics3 with a wide text part and random weights; the file is in the dtype of ``--stored``, float32 is
trained. Memory is resident memory of a process, pages of the mapped file included; peaks are reset before each phase
(Linux only), libraries are imported before the first, and holes in the heap do not count (``HEAP``). Both processes
share two cores, so seconds are comparable within one table only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy

from rllava_pl.datamodules import SyntheticVisionDataModule
from rllava_pl.datamodules.synthetic import TASKS
from rllava_pl.distributed.collectives import rank
from rllava_pl.models import VLM, TinyVLM
from rllava_pl.modules import GRPO
from rllava_pl.rewards import AnswerTagReward
from rllava_pl.strategies import RLDeepSpeedStrategy, RLFSDP2Strategy, RLFSDPStrategy, adapter_for
from rllava_pl.types import Sampling

LIBRARIES = {
    "rl_ddp": [],
    "rl_fsdp": ["torch.distributed.fsdp", "rllava_pl.models.lazy_weights"],
    "rl_fsdp2": ["torch.distributed.fsdp", "rllava_pl.models.lazy_weights"],
    "rl_deepspeed": ["deepspeed", "transformers.integrations.deepspeed"],
}
"""Imported before memory is measured."""
NAMES = ("rl_ddp", "rl_fsdp", "rl_fsdp2", "rl_deepspeed_1", "rl_deepspeed_2", "rl_deepspeed_3")
MIB = 1 << 20
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library return freed tensors at once; otherwise holes in its heap are measured as well."""


def strategy(name: str) -> Strategy | str:
    """By name; DeepSpeed's ends with its stage."""
    if name.startswith("rl_deepspeed"):
        return RLDeepSpeedStrategy(int(name[-1]), allow_cpu=True)
    kinds = {"rl_fsdp": RLFSDPStrategy, "rl_fsdp2": RLFSDP2Strategy}
    return kinds[name](allow_cpu=True) if name in kinds else name


def build(directory: Path, width: int, layers: int, stored: str) -> None:
    """A tiny idefics3 whose text part is wide and deep, with random weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    tiny = TinyVLM("idefics3", questions=[TASKS["color"].question], answers=list(TASKS["color"].answers))
    tiny.prepare(1)
    config = AutoConfig.from_pretrained(tiny.path)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = width, 3 * width, layers
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = width // 64, width // 128, 64
    model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, stored))
    model.generation_config.eos_token_id = AutoProcessor.from_pretrained(tiny.path).tokenizer.eos_token_id
    model.save_pretrained(directory)
    AutoProcessor.from_pretrained(tiny.path).save_pretrained(directory)


class Memory(Callback):
    """Peaks of resident memory by phase, in MiB."""

    def __init__(self) -> None:
        self.facts: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is loaded."""
        self.before = reset_peak()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After everything is loaded and sharded; stream once."""
        self.facts |= {"load_peak": read("VmHWM") - self.before, "kept": read("VmRSS") - self.before}
        self.facts["held"] = sum(local(p).numel() * p.element_size() for p in pl_module.parameters()) / MIB
        before, largest = reset_peak(), 0
        for _, x in adapter_for(trainer.strategy).full_weights(pl_module.policy.model):
            largest = max(largest, x.numel() * x.element_size())
            del x
        self.facts |= {"stream_peak": read("VmHWM") - before, "largest_tensor": largest / MIB}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start the clock of a pass."""
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Rollout, reference and update together; the last pass counts."""
        self.facts["pass_seconds"] = time.perf_counter() - self.since


def local(p: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter between forwards."""
    return getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p)


def reset_peak() -> float:
    """Reset the peak to the present resident memory; returns it in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return read("VmRSS")


def read(field: str) -> float:
    """A field of the process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def work(name: str, checkpoint: str, output: Path) -> None:
    """One rank."""
    torch.set_num_threads(1)
    VLM(checkpoint).load(mode="empty")  # imports everything that loading needs
    for library in LIBRARIES[name if name in LIBRARIES else "rl_deepspeed"]:
        import_module(library)
    memory = Memory()
    fit(name, VLM(checkpoint), SyntheticVisionDataModule(train_size=16, batch_size=2), memory, group=2, tokens=4)
    finish(memory.facts, output / f"{name}-{rank()}.json")


def fit(name: str, vlm: VLM, data: LightningDataModule, callback: Callback, *, group: int, tokens: int) -> None:
    """A few passes of GRPO with SGD under a strategy."""
    module = GRPO(
        vlm,
        [AnswerTagReward()],
        group_size=group,
        sampling=Sampling(max_tokens=tokens),
        max_rollouts=3,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    )
    ranks = int(os.environ["WORLD_SIZE"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    quiet |= {"enable_model_summary": False, "max_epochs": -1, "use_distributed_sampler": False}
    trainer = Trainer(accelerator="cpu", devices=ranks, strategy=strategy(name), callbacks=[callback], **quiet)
    trainer.fit(module, data)


def finish(facts: dict[str, float], file: Path) -> None:
    """Write the facts of this rank; all ranks end together."""
    file.write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def launch(script: str, name: str, checkpoint: Path, output: Path) -> list[dict[str, float]]:
    """The facts of both ranks of a script's worker."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = os.environ | HEAP | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*torchrun, "--worker", name, str(checkpoint), str(output)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-8000:]}")
    return [json.loads((output / f"{name}-{k}.json").read_text()) for k in range(2)]


def main() -> None:
    """Print a Markdown table with a row for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", choices=("bfloat16", "float32"), default="bfloat16", help="dtype of the file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], options.worker[1], Path(options.worker[2]))
        return
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model"
        build(checkpoint, options.width, options.layers, options.stored)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / MIB
        print(f"file: {size:.0f} MiB, {options.stored}\n")
        print("| strategy | held | kept when loaded | peak while loading | extra peak of stream | largest | seconds |")
        print("|---|---|---|---|---|---|---|")
        for name in options.strategies:
            a, b = launch(__file__, name, checkpoint, Path(directory))
            keys = ("held", "kept", "load_peak", "stream_peak")
            pairs = [f"{a[key]:.0f} / {b[key]:.0f}" for key in keys]
            row = [name, *pairs, f"{a['largest_tensor']:.0f}", f"{a['pass_seconds']:.1f}"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
