"""A dummy image in the padding runs the vision tower and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rllava_pl.models.policy import Policy
from tests.models.conftest import FAMILIES, random_batch
from tests.models.test_policy import log_probs_and_gradients


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_image_gives_zero_gradients_and_changes_nothing(
    load: Callable[..., Policy], family: str, share_prompt: bool
) -> None:
    policy = load(family, share_prompt=share_prompt)
    batch = random_batch(policy, [0, 0])
    logp, entropy, text = log_probs_and_gradients(policy, batch)
    policy.needs_dummy_image = True
    dummy_logp, dummy_entropy, dummy = log_probs_and_gradients(policy, batch)
    torch.testing.assert_close(dummy_logp, logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(dummy_entropy, entropy, atol=1e-5, rtol=0)
    with_image = log_probs_and_gradients(policy, random_batch(policy, [1, 0]))[2]
    assert dummy.keys() == with_image.keys()  # the same gradients to reduce as in a batch with an image
    for name, gradient in dummy.items():
        torch.testing.assert_close(gradient, text.get(name, torch.zeros_like(gradient)), atol=1e-5, rtol=1e-4)


def test_batch_with_an_image_gets_no_dummy_image(load: Callable[..., Policy]) -> None:
    policy = load("idefics3")
    inputs = random_batch(policy, [1, 0]).inputs
    alone = policy.collate(inputs)
    policy.needs_dummy_image = True
    assert policy.collate(inputs).keys() == alone.keys()
    assert all(torch.equal(x, alone[name]) for name, x in policy.collate(inputs).items())
