"""One environment for every test: one thread, no network, no GPU unless asked for, and skips that say why."""

from __future__ import annotations

import importlib.util
import os

# Before torch and transformers are imported, in this process and in every process a test starts.
os.environ.update(
    OMP_NUM_THREADS="1",  # equal arithmetic on every machine, and no fight over cores between processes
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",  # a fork after its threads started would deadlock
    HF_HUB_OFFLINE="1",  # a test that needs the network fails at once, with the name of what it asked for
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
)
# The suite is about the CPU; for the GPU tests: CUDA_VISIBLE_DEVICES=0 pytest -m gpu
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

torch.set_num_threads(1)
torch.set_num_interop_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long forms unless they are asked for; skip, with the reason, what this machine cannot run."""
    if "soak" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device is visible; set CUDA_VISIBLE_DEVICES=0 to show one"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = 'vLLM is not installed; pip install "rllava-pl[vllm]"'
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
