"""The policy's forward: the shared-prompt form equals the plain form for every mix of images and lengths."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rllava_pl.models import VLM, LoRA
from rllava_pl.models.encoding import extend
from rllava_pl.models.policy import Policy, next_positions, spread
from rllava_pl.types import PolicyBatch
from tests.models.conftest import FAMILIES, prompts, random_batch

IMAGES = {"one": [1, 1], "two": [2, 2], "none": [0, 0], "mixed": [0, 1, 3, 2], "single prompt": [1]}


Result = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def log_probs_and_gradients(policy: Policy, batch: PolicyBatch) -> Result:
    policy.zero_grad()
    logp, entropy, _ = policy(batch)
    upstream = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    ((logp + 0.1 * entropy) * upstream).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return logp.detach(), entropy.detach(), gradients


def assert_same(policy: Policy, batch: PolicyBatch) -> None:
    assert policy.shares_prompt
    shared = log_probs_and_gradients(policy, batch)
    policy.shares_prompt = False
    plain = log_probs_and_gradients(policy, batch)
    policy.shares_prompt = True
    torch.testing.assert_close(shared[0], plain[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(shared[1], plain[1], atol=1e-5, rtol=0)
    assert shared[2].keys() == plain[2].keys()
    difference = torch.cat([(shared[2][n] - plain[2][n]).flatten() for n in plain[2]]).norm()
    assert difference <= 1e-5 * torch.cat([g.flatten() for g in plain[2].values()]).norm()


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_plain(load: Callable[..., Policy], family: str, images: Sequence[int]) -> None:
    policy = load(family)
    assert_same(policy, random_batch(policy, images))


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_plain_with_gradient_checkpointing(load: Callable[..., Policy], family: str) -> None:
    policy = load(family, gradient_checkpointing=True)
    assert policy.training
    assert_same(policy, random_batch(policy, IMAGES["mixed"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompt_equals_plain_with_lora(load: Callable[..., Policy], family: str) -> None:
    policy = load(family, lora=LoRA(r=4))
    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same(policy, random_batch(policy, IMAGES["mixed"]))


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_shared_prompt_equals_plain_for_responses_of_one_token(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    assert_same(policy, random_batch(policy, [1, 2], tokens=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_do_not_depend_on_the_rest_of_the_batch(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    batch = random_batch(policy, [0, 1, 3, 2])
    with torch.no_grad():
        together = policy(batch).logp_NT
        for p in range(4):
            rows = slice(3 * p, 3 * p + 3)
            alone = PolicyBatch(batch.inputs[p : p + 1], 3, batch.response_ids_NT[rows], batch.mask_NT[rows])
            torch.testing.assert_close(together[rows], policy(alone).logp_NT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["idefics3", "qwen3_vl"])
def test_activation_offload_is_bit_equal(
    load: Callable[..., Policy], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is offloaded are the inputs of layers: few tensors, and none of the layers' weights."""
    saved = []

    class Recording(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda x: saved.append(x.data_ptr()) or pack(x)

    monkeypatch.setattr("torch.autograd.graph.save_on_cpu", Recording)
    policy = load(family, gradient_checkpointing=True)
    batch = random_batch(policy, IMAGES["mixed"])
    expected = log_probs_and_gradients(policy, batch)
    assert not saved
    policy = load(family, gradient_checkpointing=True, activation_offload=True)
    actual = log_probs_and_gradients(policy, batch)
    layers = policy.model.get_decoder().layers
    assert len(saved) >= len(layers)
    assert not {p.data_ptr() for p in layers.parameters()} & set(saved)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_offload_without_checkpointing_is_refused(tiny_path: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=r"activation_offload .*: set gradient_checkpointing, too"):
        VLM(tiny_path("idefics3"), activation_offload=True)


def test_padding_behind_a_response_has_no_influence(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    batch = random_batch(policy, [1, 1])
    garbage = torch.where(batch.mask_NT, batch.response_ids_NT, 77)
    wider = torch.nn.functional.pad(garbage, (0, 3), value=5)
    with torch.no_grad():
        first = policy(batch)
        second = policy(PolicyBatch(batch.inputs, 3, wider, torch.nn.functional.pad(batch.mask_NT, (0, 3))))
    torch.testing.assert_close(second.logp_NT[:, :5], first.logp_NT, atol=1e-6, rtol=0)
    assert not second.logp_NT[~torch.nn.functional.pad(batch.mask_NT, (0, 3))].any()


def test_log_probs_from_hidden_states_are_those_of_the_logits(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    batch = random_batch(policy, [1, 2])
    tiled = log_probs_and_gradients(policy, batch)
    policy._from_hidden = lambda hidden_MH, *rest: policy._from_logits(policy.model.lm_head(hidden_MH), *rest)
    whole = log_probs_and_gradients(policy, batch)
    torch.testing.assert_close(tiled[:2], whole[:2], atol=1e-5, rtol=0)
    for name, gradient in whole[2].items():
        torch.testing.assert_close(tiled[2][name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_predict_each_token(load: Callable[..., Policy], family: str, share_prompt: bool) -> None:
    """Row by row, each response read alone behind its prompt without its last token."""
    policy = load(family, share_prompt=share_prompt)
    batch = random_batch(policy, IMAGES["mixed"])
    expected = []
    with torch.no_grad():
        for row, (ids_T, mask_T) in enumerate(zip(batch.response_ids_NT, batch.mask_NT, strict=True)):
            tokens = int(mask_T.sum())
            alone = policy.collate([extend(batch.inputs[row // 3], ids_T[: tokens - 1].tolist())])
            expected.append(policy.model.base_model(**alone, use_cache=False).last_hidden_state[0, -tokens:])
        hidden_MH = policy.hidden(batch)
    torch.testing.assert_close(hidden_MH, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [5, 1])
@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "plain"])
def test_forward_reads_the_hidden_states(load: Callable[..., Policy], share_prompt: bool, tokens: int) -> None:
    policy = load("qwen2_vl", share_prompt=share_prompt)
    batch = random_batch(policy, IMAGES["mixed"], tokens=tokens)
    with torch.no_grad():
        whole, halves = policy(batch), policy.read(policy.hidden(batch), batch)
    assert torch.equal(whole.logp_NT, halves.logp_NT) and torch.equal(whole.entropy_NT, halves.entropy_NT)
    assert whole.values_NT is None


def test_masked_token_inside_a_response_has_no_state_and_no_log_prob(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    batch = random_batch(policy, [1, 1])
    holes = batch.mask_NT.clone()
    holes[::2, 1] = False
    with torch.no_grad():
        every, some = policy(batch).logp_NT, PolicyBatch(batch.inputs, 3, batch.response_ids_NT, holes)
        assert len(policy.hidden(some)) == int(holes.sum())
        torch.testing.assert_close(policy(some).logp_NT, every.masked_fill(~holes, 0.0), atol=1e-6, rtol=0)


def test_batch_without_trained_tokens_still_has_a_graph(load: Callable[..., Policy]) -> None:
    """A micro-batch without trained tokens runs the model, too, so that every rank can call backward."""
    policy = load("idefics3")
    batch = random_batch(policy, [1, 1])
    silent = PolicyBatch(batch.inputs, 3, batch.response_ids_NT, torch.zeros_like(batch.mask_NT))
    assert policy.hidden(silent).shape == (0, policy.model.config.get_text_config().hidden_size)
    logp, entropy, _ = policy(silent)
    assert not logp.any() and not entropy.any()
    (logp + entropy).sum().backward()


def test_values_are_spread_row_by_row_with_gradients() -> None:
    """Weights 1, 2, 4 at the three tokens: the gradient of their weighted sum."""
    values_M = torch.tensor([5.0, 6.0, 7.0], requires_grad=True)
    values_NT = spread(values_M, torch.tensor([[False, True, False], [True, False, True], [False, False, False]]))
    assert values_NT.tolist() == [[0, 5, 0], [6, 0, 7], [0, 0, 0]]
    (values_NT * torch.tensor([[9.0, 1.0, 9.0], [2.0, 9.0, 4.0], [9.0, 9.0, 9.0]])).sum().backward()
    assert values_M.grad.tolist() == [1, 2, 4]
    assert spread(torch.zeros(0, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.bool)).dtype == torch.float64


def test_temperature_and_bans_define_the_distribution(load: Callable[..., Policy]) -> None:
    """At temperature 2 with bans, log π of all allowed tokens at one position sums to one."""
    policy = load("idefics3")
    policy.temperature = 2.0
    vocabulary = policy.model.config.get_text_config().vocab_size
    allowed = torch.tensor([i for i in range(vocabulary) if i not in policy.banned_ids])
    mask = torch.ones(len(allowed), 1, dtype=torch.bool)
    batch = PolicyBatch(tuple(policy.encode(prompts([1]))), len(allowed), allowed[:, None], mask)
    with torch.no_grad():
        logp = policy(batch).logp_NT
    torch.testing.assert_close(logp.exp().sum(), torch.tensor(1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_visual_token_can_be_sampled(load: Callable[..., Policy], family: str) -> None:
    policy = load(family)
    config = policy.model.config
    image_token = getattr(config, "image_token_id", None) or config.image_token_index
    assert image_token in policy.banned_ids
    words = ("image", "img", "vision", "video")
    visual = [token for token in policy.tokenizer.get_added_vocab() if any(word in token for word in words)]
    assert set(policy.tokenizer.convert_tokens_to_ids(visual)) <= set(policy.banned_ids)
    assert not set(policy.stop_ids) & set(policy.banned_ids)


@pytest.mark.parametrize("form", ["tiled", "from logits", "no hidden states"])
def test_forward_without_entropy_gives_the_same_log_probs_and_gradients(
    load: Callable[..., Policy], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load("idefics3")
    if form == "from logits":
        policy._from_hidden = lambda hidden_MH, *rest: policy._from_logits(policy.model.lm_head(hidden_MH), *rest)
    if form == "no hidden states":
        policy.model_family = dataclasses.replace(policy.model_family, causal=False)
    batch = random_batch(policy, IMAGES["mixed"])
    results = []
    for entropy in (True, False):
        policy.zero_grad()
        output = policy(batch, entropy=entropy)
        assert bool(output.entropy_NT.any()) == entropy
        output.logp_NT.sum().backward()
        results.append((output.logp_NT, {name: p.grad for name, p in policy.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


def test_vlm_is_an_empty_module_until_loaded_in_place(tiny_path: Callable[[str], str]) -> None:
    policy = VLM(tiny_path("idefics3"), lora=LoRA(r=4))
    copied = copy.deepcopy(policy)
    assert isinstance(policy, Policy) and not policy.loaded and not policy.state_dict()
    assert policy.load(temperature=0.5) is policy and policy.loaded and policy.temperature == 0.5
    assert not copied.loaded and not copied.load(trainable=False, mode="full").training
    assert all(name.startswith("model.") for name in policy.state_dict())
    assert not any("lora_" in name or p.requires_grad for name, p in copied.named_parameters())
    assert policy.dtype == "float32" and policy.model.dtype == torch.float32
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in copied.parameters()}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_that_is_not_positive_is_refused(load: Callable[..., Policy], temperature: float) -> None:
    policy = load("idefics3")
    with pytest.raises(ValueError, match=f"the policy's temperature is {temperature}; log-probs need a positive one"):
        Policy(policy.model, policy.processor, temperature=temperature)


def test_policy_with_another_attention_uses_the_plain_form(load: Callable[..., Policy]) -> None:
    """With another attention the packed row would let every token see every other: the plain form must take over."""
    policy = load("idefics3", attn_implementation="eager")
    assert not policy.shares_prompt
    reference = load("idefics3")
    batch = random_batch(policy, [1, 0])
    with torch.no_grad():
        torch.testing.assert_close(policy(batch).logp_NT, reference(batch).logp_NT, atol=1e-5, rtol=0)


def test_unknown_family_uses_the_plain_form(load: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load("idefics3")
    batch = random_batch(reference, [1, 1])
    expected = log_probs_and_gradients(reference, batch)
    row = reference.model_family
    monkeypatch.setattr("rllava_pl.models.families.FAMILIES", {"idefics3": type(row)(image_axis="prompt")})
    policy = load("idefics3")
    assert not policy.shares_prompt and not policy.model_family.causal
    got = log_probs_and_gradients(policy, batch)
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"no hidden states for the family 'idefics3': .* without a critic"):
        policy.hidden(batch)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_shared_attention_does_not_change_sampling(load: Callable[..., Policy], family: str) -> None:
    shared, plain = load(family), load(family, share_prompt=False)
    inputs = shared.collate(shared.encode(prompts([1, 1])))
    del inputs["position_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(shared.model.generate(**inputs, **options), plain.model.generate(**inputs, **options))


def test_next_position_ignores_left_padding() -> None:
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])  # two pads, none
    assert next_positions(positions).tolist() == [3, 5]
    axes = torch.stack([positions, positions + 1, positions])  # a picture that is taller than it is long
    assert next_positions(axes).tolist() == [4, 6]


def test_dropout_is_off_so_that_ratios_start_at_one(load: Callable[..., Policy]) -> None:
    policy = load("idefics3").train()
    assert all(m.p == 0.0 for m in policy.modules() if isinstance(m, torch.nn.Dropout))
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in policy.modules())


def test_adapters_off_is_the_base_model_bit_for_bit(load: Callable[..., Policy]) -> None:
    base, policy = load("idefics3"), load("idefics3", lora=LoRA(r=4))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch(policy, [1, 2])
    trainable = [n for n, p in policy.named_parameters() if p.requires_grad]
    with torch.no_grad():
        expected = base(batch).logp_NT
        with policy.adapters_off():
            assert torch.equal(policy(batch).logp_NT, expected)
        assert not torch.allclose(policy(batch).logp_NT, expected)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trainable
    assert trainable and all("lora_" in name for name in trainable)


def text_only(tiny_path: Callable[[str], str]) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """A random text-only language model, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path("qwen2_vl"))
    tokenizer.chat_template = tokenizer.chat_template.replace("part['type'] == 'image'", "False")
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def test_text_only_language_model_is_a_policy(tiny_path: Callable[[str], str], tmp_path: Path) -> None:
    for part in text_only(tiny_path):
        part.save_pretrained(tmp_path)
    policy = VLM(str(tmp_path)).load()
    assert_same(policy, random_batch(policy, [0, 0, 0]))
    with pytest.raises(ValueError, match="prompt 'test:0' carries images, but the model reads text only"):
        policy.encode(prompts([1]))


def test_head_with_a_bias_gives_the_log_probs_of_its_logits(tiny_path: Callable[[str], str]) -> None:
    """Tiles multiply with the head's weight alone: a bias of 5 on one token would be lost."""
    model, tokenizer = text_only(tiny_path)
    model.lm_head.bias = torch.nn.Parameter(5.0 * (torch.arange(len(tokenizer)) == 30))
    policy = Policy(model, tokenizer, share_prompt=False)
    batch = PolicyBatch(tuple(policy.encode(prompts([0]))), 1, torch.tensor([[30, 40]]), torch.ones(1, 2) > 0)
    context = policy.collate([extend(batch.inputs[0], [30])])
    with torch.no_grad():
        logits_TV = model(**context).logits[0, -2:].index_fill(1, torch.tensor(policy.banned_ids), float("-inf"))
        expected = logits_TV.log_softmax(-1).gather(1, torch.tensor([[30], [40]]))[:, 0]
        torch.testing.assert_close(policy(batch).logp_NT[0], expected, atol=1e-5, rtol=0)
