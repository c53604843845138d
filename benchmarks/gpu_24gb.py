"""Full-parameter RL of a real architecture on a card capped at 24 GiB: peak memory of every phase, and tokens a second.

    python benchmarks/gpu_24gb.py --output gpu.json                  # Qwen3-VL-4B, embedded engine, reference policy
    python benchmarks/gpu_24gb.py --engine vllm --kl 0               # rollouts by vLLM, no reference
    python benchmarks/gpu_24gb.py --states int8 --gradients bfloat16 # host memory of a 48 GB machine
    python benchmarks/gpu_24gb.py --size tiny                        # the same on a CPU, in seconds

The model is built from its published config with random weights, on the device and in bf16; nothing is downloaded. The
rest is an ordinary run: GRPO in a Trainer, images, the host optimizer, gradient checkpointing, log-probs in tiles.
Random weights hardly ever end a response, so all responses have the largest length: the worst case for memory.

Each measured peak is printed beside that of the memory plan. ``device`` is the memory in use on the whole card,
including context and libraries; it is sampled every 20 ms, while the allocator's peaks are exact.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rllava_pl.callbacks import RolloutCallback, TransformersRollout, VLLMRollout
from rllava_pl.callbacks.plan_settings import settings_of
from rllava_pl.datamodules import SyntheticVisionDataModule
from rllava_pl.datamodules.synthetic import TASKS, DrawnPrompts
from rllava_pl.loop.options import KL, Batching
from rllava_pl.memory import MemoryPlan, PromptSize, plan
from rllava_pl.memory.placement import host_adamw
from rllava_pl.models import VLM, tiny
from rllava_pl.models.architectures import architecture, config_of
from rllava_pl.models.encoding import encode
from rllava_pl.models.families import FAMILIES
from rllava_pl.models.processors import load_processor
from rllava_pl.models.vlm import LoadMode
from rllava_pl.modules import GRPO, RLModule
from rllava_pl.optim import HostAdamW
from rllava_pl.rewards import BaseReward
from rllava_pl.types import Rollout, Sampling, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
UPDATE = ("update", "optimizer")
"""Phases of the plan that belong to the phase ``update`` of a run; the others have equal names."""
SHORT = {"max_tokens": 8, "group_size": 4, "micro_batch_size": 4, "prompts": 2, "image_side": 56}
"""Options of ``--size tiny``."""

Row = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Run, print a table and, if asked for, write a JSON file."""
    options = _options(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.size == "full" and device == "cpu":
        raise SystemExit("the full size needs a GPU; --size tiny runs on a CPU")
    context = cap(options) if device == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, device, Path(folder))
    report["machine"] = machine(device) | {"context_gib": context / GIB}
    print(table(report))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    if report["failure"]:
        raise SystemExit(str(report["failure"]))
    return report


def cap(options: argparse.Namespace) -> int:
    """Limit the allocator to the memory that a card of this size would have; returns the bytes of the context."""
    if options.engine == "embedded":  # avoids fragmentation by varying lengths; vLLM's sleep mode needs it off
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    torch.empty(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (options.gib * GIB - context) / total))
    return context


def run(options: argparse.Namespace, device: str, folder: Path) -> dict[str, object]:
    """A short training run with its peaks; a run that fails is reported up to the failure."""
    policy = RandomVLM(str(directory(options, folder)), dtype="bfloat16", gradient_checkpointing=True)
    rollout, peaks = engine(options), Peaks(device)
    module = algorithm(options, policy)
    data = SyntheticVisionDataModule(task="color", batch_size=options.prompts, train_size=1024)
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=-1,
        callbacks=[rollout, peaks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    found, failure = planned(options, module, rollout, device), ""
    try:
        trainer.fit(module, data)
    except RuntimeError as error:  # includes out-of-memory errors
        failure = f"{type(error).__name__}: {error}"
    phases = {name: row | predictions(found, name) for name, row in peaks.rows.items()}
    return {
        "options": vars(options),
        "parameters": found.size.parameters,
        "failure": failure,
        "rollouts": peaks.rollouts,
        "phases": phases,
        "largest_device_gib": max(row["device_bytes"] for row in phases.values()) / GIB,
    }


# What is run ---------------------------------------------------------------------------------------------------------


class RandomVLM(VLM):
    """Random weights from a config."""

    def load_model(self, mode: LoadMode) -> PreTrainedModel:
        """A model of the config alone."""
        from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

        config = AutoConfig.from_pretrained(self.path)
        dtype = getattr(torch, self.dtype)
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=self.attn_implementation
        )
        model.generation_config = GenerationConfig.from_pretrained(self.path)
        return model


class IdSum(BaseReward):
    """A graded reward, because all answers of random weights are wrong and equal rewards have no gradient."""

    isolation = "none"

    def score(self, rollout: Rollout) -> Score:
        """The sum of the token ids modulo 97, between 0 and 1."""
        return Score(int(rollout.response_ids.sum()) % 97 / 96)


def algorithm(options: argparse.Namespace, policy: VLM) -> RLModule:
    """GRPO; a KL term needs a reference policy, a second set of weights."""
    return GRPO(
        policy,
        [IdSum()],
        group_size=options.group_size,
        sampling=Sampling(max_tokens=options.max_tokens),
        max_rollouts=options.rollouts,
        batching=Batching(micro_batch_size=options.micro_batch_size),
        kl=KL(loss_coef=options.kl),
        optimizer=partial(HostAdamW, lr=1e-6, states=options.states, gradients=options.gradients),
    )


def engine(options: argparse.Namespace) -> RolloutCallback:
    """The rollout callback."""
    if options.engine == "embedded":
        return TransformersRollout(batch_prompts=options.rollout_prompts)
    context = options.max_tokens + 1024
    return VLLMRollout(
        context_tokens=context, images_per_prompt=1, kv_cache_gib=options.kv_gib, options={"load_format": "dummy"}
    )


def directory(options: argparse.Namespace, folder: Path) -> Path:
    """Config, tokenizer and processor of the model.

    The tokenizer is that of the tiny model; the larger vocabulary of the architecture determines the memory.
    """
    task = TASKS["color"]
    path = tiny.build(
        folder / "model", family="qwen3_vl", questions=[task.question], answers=task.answers, warmup_steps=0
    )
    if options.size == "tiny":
        return path
    from transformers import AutoConfig

    small, config = AutoConfig.from_pretrained(path), architecture(options.model)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(small, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(small.text_config, name))
    config.save_pretrained(path)
    processor = load_processor(path)
    processor.image_processor.patch_size = config.vision_config.patch_size
    area = options.image_side**2
    processor.image_processor.size = {"shortest_edge": area, "longest_edge": area}
    processor.save_pretrained(path)
    (path / "model.safetensors").unlink()
    return path


# What is measured ----------------------------------------------------------------------------------------------------


class Peaks(Callback):
    """Peak memory of every phase, and the speed of every rollout.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.rows: defaultdict[str, Row] = defaultdict(lambda: defaultdict(float))
        self.rollouts: list[Row] = []
        self._phases = ["load"]
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Observe the phases from here on."""
        pl_module.phases.observers.append(self)
        self._sampler.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is loaded."""
        self._read()
        self._phases = ["between"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop sampling."""
        self._done.set()
        self._sampler.join()
        self._read()

    def phase_begins(self, name: str) -> None:
        """Peaks up to here belong to the phase around this one."""
        self._read()
        self._phases.append(name)

    def phase_ends(self, name: str, seconds: float) -> None:
        """Return to the phase around this one."""
        self._read()
        self._phases.pop()
        self.rows[name]["seconds"] += seconds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Speed of one rollout."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        tokens = metrics["train/response_tokens"] * len(args[1]) * pl_module.group_size
        row = {name: value for name, value in metrics.items() if name.startswith("time/")}
        row["response_tokens"] = tokens
        row["sampled_tokens_a_second"] = tokens / metrics["time/rollout_seconds"]
        row["trained_tokens_a_second"] = tokens / metrics["time/update_seconds"]
        row["grad_norm"] = metrics["train/grad_norm"]
        self.rollouts.append(row)

    def _read(self) -> None:
        """Add the allocator's peaks since the last call to the running phase, and reset them."""
        row = self.rows[self._phases[-1]]
        if self.on_gpu:
            torch.cuda.synchronize()
            row["allocated_bytes"] = max(row["allocated_bytes"], torch.cuda.max_memory_allocated())
            row["reserved_bytes"] = max(row["reserved_bytes"], torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        self._look(row)

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self._look(self.rows[self._phases[-1]])

    def _look(self, row: Row) -> None:
        row["host_bytes"] = max(row["host_bytes"], resident_bytes())
        free, total = torch.cuda.mem_get_info() if self.on_gpu else (0, 0)
        row["device_bytes"] = max(row["device_bytes"], total - free)


def resident_bytes() -> int:
    """Host memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def planned(options: argparse.Namespace, module: RLModule, rollout: RolloutCallback, device: str) -> MemoryPlan:
    """The plan of this run."""
    processor = load_processor(module.policy.path)
    (inputs,) = encode(processor, [DrawnPrompts("color", "train", 1)[0]], FAMILIES["qwen3_vl"])
    image_id = config_of(module.policy.path).image_token_id
    tokens, of_image = len(inputs.input_ids_S), int((inputs.input_ids_S == image_id).sum())
    settings = settings_of(
        module,
        [rollout],
        placement=host_adamw(options.states, options.gradients),
        precision="32-true",
        ranks=1,
        batch_prompts=options.prompts,
        prompt=PromptSize(tokens, 1, of_image),
        device=device,
    )
    return plan(settings, module.optimizer)


def predictions(found: MemoryPlan, name: str) -> Row:
    """Bytes of the plan for a phase of the run; empty if the plan does not have it."""
    phases = [phase for phase in found.phases if phase.name in (UPDATE if name == "update" else (name,))]
    if not phases:
        return {}
    return {
        "predicted_device_bytes": max(phase.gpu for phase in phases),
        "predicted_allocated_bytes": max(sum(item.gpu for item in phase.items if not item.assumed) for phase in phases),
        "predicted_host_bytes": max(phase.host for phase in phases),
    }


def machine(device: str) -> dict[str, object]:
    """The machine of the figures."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, object] = {
        "cores": os.cpu_count(),
        "host_gib": host / GIB,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "device_gib": properties.total_memory / GIB}
    return found


def table(report: dict[str, object]) -> str:
    """The report as text."""
    columns = ("allocated", "predicted_allocated", "reserved", "device", "predicted_device", "host", "predicted_host")
    lines = [f"{'GiB':10}" + "".join(f"{name.replace('predicted_', '≈'):>12}" for name in columns) + f"{'s':>9}"]
    for name, row in report["phases"].items():
        cells = "".join(f"{row.get(f'{column}_bytes', 0) / GIB:>12.2f}" for column in columns)
        lines.append(f"{name:10}{cells}{row.get('seconds', 0.0):>9.2f}")
    for row in report["rollouts"][-1:]:
        sampled, trained = row["sampled_tokens_a_second"], row["trained_tokens_a_second"]
        lines.append(f"last rollout: {sampled:.0f} tokens a second sampled, {trained:.0f} trained")
    lines.append(f"{report['parameters']:,} parameters; {report['machine']}; ≈ marks the plan")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: 0.3 M parameters, short")
    parser.add_argument("--model", choices=["qwen3_vl_4b", "qwen3_vl_8b"], default="qwen3_vl_4b")
    parser.add_argument("--gib", type=float, default=24.0, help="of the card that is emulated (default 24)")
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded")
    parser.add_argument("--kl", type=float, default=0.01, help="0: no reference policy (default 0.01)")
    parser.add_argument("--states", choices=["float32", "bfloat16", "int8"], default="float32")
    parser.add_argument("--gradients", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8, help="of a rollout (default 8)")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a response (default 1024)")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--rollout-prompts", type=int, default=2, help="sampled at a time by the embedded engine")
    parser.add_argument("--kv-gib", type=float, default=4.0, help="of vLLM's cache (default 4)")
    parser.add_argument("--image-side", type=int, default=448, help="pixels (default 448, which is 196 tokens)")
    parser.add_argument("--output", default="", help="JSON file")
    options = parser.parse_args(arguments)
    if options.size == "tiny":
        vars(options).update(SHORT)
    return options


if __name__ == "__main__":
    main()
