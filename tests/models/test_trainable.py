"""Freezing, adapters, and weights as a checkpoint names them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rllava_pl.models import LoRA
from rllava_pl.models.policy import Policy
from rllava_pl.models.trainable import hf_weights
from tests.models.conftest import FAMILIES, random_batch


def trained_parts(policy: Policy) -> set[str]:
    parts = {"vision": ("vision", "visual"), "connector": ("connector", "projector", "merger")}
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    found = {part for name in names for part, words in parts.items() if any(word in name for word in words)}
    return found | ({"text"} if any("layers" in n and "vis" not in n for n in names) else set())


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_tower_and_connector_freeze_separately(load: Callable[..., Policy], family: str) -> None:
    tower = load(family, freeze=["vision_tower"])
    connector = load(family, freeze=["connector"])
    frozen = {name for name, p in tower.named_parameters() if not p.requires_grad}
    bridge = {name for name, p in connector.named_parameters() if not p.requires_grad}
    assert frozen and bridge and not frozen & bridge
    assert all(any(word in name for word in ("connector", "projector", "merger")) for name in bridge)
    both = load(family, freeze=["vision_tower", "connector"])
    assert {name for name, p in both.named_parameters() if not p.requires_grad} == frozen | bridge
    assert trained_parts(both) == {"text"}


def test_language_model_and_embeddings_freeze(load: Callable[..., Policy]) -> None:
    assert "text" not in trained_parts(load("idefics3", freeze=["language_model"]))
    policy = load("idefics3", freeze=["embeddings"])
    frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]
    assert frozen == ["model.model.text_model.embed_tokens.weight"]


def test_glob_that_matches_nothing_is_refused(load: Callable[..., Policy]) -> None:
    with pytest.raises(ValueError, match=r"freeze: 'model\.visoin\.\*' matches nothing; names of this model look like"):
        load("idefics3", freeze=["model.visoin.*"])
    with pytest.raises(ValueError, match=r"lora\.target_modules: '\*\.q' matches nothing"):
        load("idefics3", lora=LoRA(target_modules=["*.q"]))


def test_frozen_parameters_get_no_gradient(load: Callable[..., Policy]) -> None:
    policy = load("idefics3", freeze=["vision_tower"])
    policy(random_batch(policy, [1, 1])).logp_NT.sum().backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_the_language_model_only_by_default(load: Callable[..., Policy], family: str) -> None:
    policy = load(family, lora=LoRA(r=2))
    adapted = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert adapted and all("lora_" in name and "vis" not in name.split("lora_")[0] for name in adapted)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_weights_are_those_of_the_checkpoint(
    load: Callable[..., Policy], tiny_path: Callable[[str], str], family: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_path(family))
    streamed = dict(hf_weights(load(family).model))
    assert streamed.keys() == model.state_dict().keys() and "lm_head.weight" in streamed
    for name, tensor in model.state_dict().items():
        assert torch.equal(streamed[name], tensor), name


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_adapters_are_merged_in_the_stream_and_unchanged_in_the_model(load: Callable[..., Policy], family: str) -> None:
    policy, base = load(family, lora=LoRA(r=4, alpha=8)), load(family)
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    batch = random_batch(policy, [1, 2])
    base.model.load_state_dict(dict(hf_weights(policy.model)))
    with torch.no_grad():
        torch.testing.assert_close(base(batch).logp_NT, policy(batch).logp_NT, atol=1e-5, rtol=0)
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
