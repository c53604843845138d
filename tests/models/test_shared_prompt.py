"""The order of tokens in a packed row, and that it holds no padding and no prompt twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rllava_pl.models.policy import Policy, context_lengths
from rllava_pl.models.shared_prompt import Layout
from tests.models.conftest import FAMILIES, random_batch

PROMPTS, RESPONSES = [3, 2], [1, 0, 2, 1]  # the row: a a a | b | (none) | c c | d d | e


@pytest.fixture
def layout() -> Layout:
    return Layout.of(PROMPTS, RESPONSES, torch.device("cpu"))


def test_row_holds_every_prompt_before_its_responses(layout: Layout) -> None:
    prompts_PS = torch.tensor([[10, 11, 12], [20, 21, -1]])
    responses_NR = torch.tensor([[110, -1], [-1, -1], [210, 211], [220, -1]])
    assert layout.row(prompts_PS, responses_NR).tolist() == [10, 11, 12, 110, 20, 21, 210, 211, 220]
    axes = layout.row(prompts_PS.expand(3, -1, -1), responses_NR.expand(3, -1, -1))
    assert axes.shape == (3, 9) and axes[2].tolist() == layout.row(prompts_PS, responses_NR).tolist()


def test_first_token_is_predicted_by_the_prompt_and_others_by_the_previous_token(layout: Layout) -> None:
    mask_NT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 1, 0]]).bool()
    assert layout.predictors(mask_NT).tolist() == [2, 3, 2, 5, 7, 8]


def test_response_attends_to_its_prompt_and_its_earlier_tokens(layout: Layout) -> None:
    """Keys: three of the prompt (two of the second, then padding), two of the response."""
    first, second = layout.seen[0, 0].int().tolist(), layout.seen[2, 0].int().tolist()
    assert first == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert second == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert Layout.of([3, 3], RESPONSES, torch.device("cpu")).seen.shape == (1, 1, 2, 5)  # one for all


def test_states_and_join_are_inverse_for_values_and_gradients(layout: Layout) -> None:
    row = torch.randn(1, 4, 9, 5, requires_grad=True)
    prompts, responses = layout.states(row)
    assert prompts.shape == (2, 4, 3, 5) and responses.shape == (4, 4, 2, 5)
    again = layout.join(prompts, responses)
    assert torch.equal(again, row.transpose(1, 2))
    upstream = torch.randn_like(again)
    (gradient,) = torch.autograd.grad(again, row, upstream)
    assert torch.equal(gradient, upstream.transpose(1, 2))
    behind = layout.behind(prompts, responses)
    assert torch.equal(behind[3, :, :3], prompts[1]) and torch.equal(behind[3, :, 3:], responses[3])


def test_linear_layers_of_the_decoder_get_no_padding(load: Callable[..., Policy]) -> None:
    policy = load("qwen3_vl")
    batch = random_batch(policy, [0, 1, 3, 2])
    seen = set()
    for module in policy.model.get_decoder().modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: seen.add(args[0].shape[:-1].numel()))
    policy(batch)
    contexts = [int(row.nonzero().max()) for row in batch.mask_NT]  # all tokens but the last
    assert seen == {sum(map(len, batch.inputs)) + sum(contexts)}


@pytest.mark.parametrize("family", FAMILIES)
def test_image_passes_the_tower_once_per_group(load: Callable[..., Policy], family: str) -> None:
    """Pixels that enter the tower: those of the prompts' images, against three times as many in the plain form."""
    pixels = {}
    for share_prompt in (True, False):
        policy = load(family, share_prompt=share_prompt)
        tower = policy.model.get_submodule(policy.model_family.vision_tower.removesuffix(".*"))
        tower.register_forward_pre_hook(
            lambda module, args, kwargs, share=share_prompt: pixels.update({share: _numel(args, kwargs)}),
            with_kwargs=True,
        )
        batch = random_batch(policy, [0, 1, 2], group=3)
        with torch.no_grad():
            policy(batch)
    parts = [part for x in batch.inputs if x.images for part in x.images["pixel_values"]]  # images, or patches of them
    assert pixels[True] == sum(part.numel() for part in parts if part.any())  # some processors add images of zeros
    assert pixels[False] == 3 * pixels[True]


def _numel(args: tuple[object, ...], kwargs: dict[str, object]) -> int:
    return max(x.numel() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())


def test_context_ends_before_the_last_token_under_the_mask() -> None:
    mask_NT = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    assert context_lengths(mask_NT) == [3, 0, 0]
