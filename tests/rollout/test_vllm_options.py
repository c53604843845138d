"""Options of the vLLM callback and files of adapters, without an engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rllava_pl.callbacks import VLLMRollout
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import LoRA
from rllava_pl.rollout.vllm_adapter import AdapterFile, adapter_options, base_weights

REFUSED = {
    "kv_cache_gib is 0": {"kv_cache_gib": 0},
    r"sync_check_every \(-1\) and sync_check_limit \(0.0\) must not be negative": {"sync_check_every": -1},
    "memory discard leaves garbage wherever a sync misses a tensor; set sync_check_every: 1": {
        "memory": "discard",
        "sync_check_every": 0,
    },
}


@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=lambda x: str(x)[:20])
def test_invalid_options_are_refused(message: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMRollout(**options)


def test_memory_mode_discard_checks_after_every_sync() -> None:
    assert VLLMRollout(memory="discard", sync_check_every=50).sync_check_every == 1


def test_adapters_that_vllm_cannot_load_are_refused(load: Callable[..., Policy]) -> None:
    with pytest.raises(ValueError, match="lora: adapter needs a policy with LoRA adapters"):
        adapter_options(load("idefics3"))
    everywhere = load("idefics3", lora=LoRA(r=4, target_modules=["*_proj"]))
    with pytest.raises(ValueError, match=r"would leave out model\.vision_model.* vLLM ignores adapters outside"):
        adapter_options(everywhere)
    assert adapter_options(load("idefics3", lora=LoRA(r=12)))["max_lora_rank"] == 16
    with pytest.raises(ValueError, match="rank 600 is above vLLM's largest, 512"):
        adapter_options(load("idefics3", lora=LoRA(r=600)))


def test_base_weights_equal_the_model_without_adapters(load: Callable[..., Policy]) -> None:
    plain, adapted = load("idefics3").model.state_dict(), load("idefics3", lora=LoRA(r=4)).model
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 1.0
    streamed = dict(base_weights(adapted))
    assert streamed.keys() == plain.keys()
    assert all(torch.equal(streamed[name], plain[name]) for name in plain)


def test_adapter_files_are_in_peft_format(load: Callable[..., Policy]) -> None:
    from safetensors.torch import load_file

    model = load("idefics3", lora=LoRA(r=4)).model
    file = AdapterFile(model)
    model.save_pretrained(file.path)
    tensors = load_file(file.path / "adapter_model.safetensors")
    assert (file.path / "adapter_config.json").is_file()
    assert all(name.startswith("base_model.model.") and ".lora_" in name for name in tensors)
    assert len(tensors) == sum(".lora_" in name for name, _ in model.named_parameters())
    file.close()
    assert not file.path.exists()
