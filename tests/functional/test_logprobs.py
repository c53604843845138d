"""Log-probs and entropies of tokens, from logits and from hidden states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rllava_pl.functional.logprobs import chunked_token_log_probs, token_log_probs
from tests.functional.cases import assert_near, generator, matrix

DTYPES = [torch.float32, torch.float64]
N, T, H, V = 3, 5, 4, 11


class Recorder(TorchDispatchMode):
    """Names of the operations and the largest storage any of them returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def slow_token(logits: list[float], token: int, temperature: float, banned: list[int]) -> tuple[float, float]:
    z = {v: logit / temperature for v, logit in enumerate(logits) if v not in banned}
    top = max(z.values())
    lse = top + math.log(sum(math.exp(value - top) for value in z.values()))
    entropy = -sum(math.exp(value - lse) * (value - lse) for value in z.values())
    return (-100.0 if token in banned else z[token] - lse), entropy


def head_inputs(seed=0, dtype=torch.float64):
    rng = generator(seed)
    hidden = torch.randn(N, T, H, generator=rng, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, generator=rng, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(V, (N, T), generator=rng)


def test_known_distributions_have_their_log_probs_and_entropies():
    logits = torch.tensor([[[1.0, 2, 5]]]).log()
    # p = (1, 2, 5) / 8: ln(1/4); entropy ln 8 - (2 ln 2 + 5 ln 5) / 8
    actual = token_log_probs(logits, torch.tensor([[1]]))
    assert [x.item() for x in actual] == pytest.approx([-1.386294, 0.900256], abs=1e-6)
    # without the third p = (1, 2) / 3: ln(2/3); entropy ln 3 - 2/3 ln 2
    actual = token_log_probs(logits, torch.tensor([[1]]), banned_ids=[2])
    assert [x.item() for x in actual] == pytest.approx([-0.405465, 0.636514], abs=1e-6)
    # temperature 2 takes roots: p = (1, 2, 3) / 6, ln(1/2); entropy ln 6 - (2 ln 2 + 3 ln 3) / 6
    logits = torch.tensor([[[1.0, 4, 9]]]).log()
    actual = token_log_probs(logits, torch.tensor([[2]]), temperature=2)
    assert [x.item() for x in actual] == pytest.approx([-0.693147, 1.011404], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_equal_a_slow_loop(dtype):
    rng = generator(1)
    for case in range(1000):
        rows, tokens, vocabulary = 1 + case % 3, 1 + case % 4, 2 + case % 7
        logits = 3 * torch.randn(rows, tokens, vocabulary, generator=rng, dtype=dtype)
        ids = torch.randint(vocabulary, (rows, tokens), generator=rng)
        temperature = (1.0, 0.6, 2.5)[case % 3]
        banned = torch.randperm(vocabulary, generator=rng)[: case % min(vocabulary, 4)].tolist()
        actual = token_log_probs(logits, ids, temperature=temperature, banned_ids=banned or None)
        pairs = zip(logits.flatten(0, 1).tolist(), ids.flatten().tolist(), strict=True)
        slow = [slow_token(row, token, temperature, banned) for row, token in pairs]
        for value, expected in zip(actual, zip(*slow, strict=True), strict=True):
            assert_near(value, matrix([list(expected)], ids), dtype=dtype)


def test_entropy_of_extreme_fp32_logits_keeps_its_digits():
    logits = 150 * torch.randn(8, 16, 512, generator=generator(2))
    ids = torch.zeros(8, 16, dtype=torch.int64)
    entropy, exact = token_log_probs(logits, ids)[1], token_log_probs(logits.double(), ids)[1]
    assert (entropy - exact).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [None, [0, 5]])
def test_gradients_are_those_of_finite_differences(temperature, banned):
    rng = generator(3)
    logits = torch.randn(2, 3, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(1, 5, (2, 3), generator=rng)
    assert torch.autograd.gradcheck(
        lambda logits: token_log_probs(logits, ids, temperature=temperature, banned_ids=banned), logits
    )


def test_banned_target_gets_minus_hundred_and_no_gradient():
    logits = torch.randn(1, 2, 5, generator=generator(4), requires_grad=True)
    logp, entropy = token_log_probs(logits, torch.tensor([[3, 1]]), banned_ids=torch.tensor([3, 4]))
    assert logp[0, 0].item() == -100.0
    gradient = torch.autograd.grad(logp[0, 0], logits, retain_graph=True)[0]
    assert (gradient == 0).all()
    gradient = torch.autograd.grad(logp.sum() + 1e6 * entropy.sum(), logits)[0]
    assert gradient.isfinite().all()
    assert (gradient[..., 3:] == 0).all()
    assert (gradient[0, 1, :3] != 0).all()


def test_banned_logits_have_no_influence():
    logits = torch.randn(2, 3, 6, generator=generator(5))
    ids = torch.randint(4, (2, 3), generator=generator(6))
    loud = logits.clone()
    loud[..., 4:] = 1e4
    for actual, expected in zip(
        token_log_probs(loud, ids, banned_ids=[4, 5]), token_log_probs(logits[..., :4], ids), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_empty_list_of_banned_ids_bans_none():
    logits, ids = torch.randn(1, 2, 4, generator=generator(7)), torch.tensor([[0, 3]])
    expected = token_log_probs(logits, ids)
    for banned in ([], (), torch.tensor([], dtype=torch.int64)):
        torch.testing.assert_close(token_log_probs(logits, ids, banned_ids=banned), expected, rtol=0, atol=0)


def test_inputs_are_neither_changed_nor_copied():
    logits, ids = torch.randn(2, 3, 6, generator=generator(8)), torch.zeros(2, 3, dtype=torch.int64)
    before = logits.clone()
    with Recorder() as recorder:
        token_log_probs(logits, ids)
    assert recorder.names.count("_log_softmax") == 1
    assert not {"_to_copy", "clone", "div", "index_fill", "masked_fill"} & set(recorder.names)
    token_log_probs(logits, ids, temperature=0.5, banned_ids=[1])
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_before_the_softmax(dtype):
    logits = (5 * torch.randn(2, 3, 64, generator=generator(9))).to(dtype)
    ids = torch.arange(6).view(2, 3)
    for actual, expected in zip(token_log_probs(logits, ids), token_log_probs(logits.double(), ids), strict=True):
        assert_near(actual, expected, dtype=torch.float32, rtol=2e-6)


def tiled_cases():
    """Heads trained and frozen, entropies trained or only looked at, bans, temperatures, tiles of 1 to 11 columns."""
    frozen_and_trained, entropies = (False, True), (0.0, 0.3)
    for case, (frozen, entropy_weight) in enumerate(itertools.product(frozen_and_trained, entropies)):
        for banned in (None, [0, 7], torch.tensor([2])):
            for temperature, chunk in ((1.0, 1), (0.7, 3), (2.5, N * T), (0.7, N * T + 7)):
                yield 10 + case, frozen, entropy_weight, banned, temperature, chunk


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_give_the_values_and_gradients_of_the_whole(dtype):
    tolerance = {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {}
    for seed, frozen, entropy_weight, banned, temperature, chunk in tiled_cases():
        hidden, weight, ids = head_inputs(seed, dtype)
        ids[0, :2] = torch.tensor([7, 2])  # banned in some cases
        inputs = (hidden,) if frozen else (hidden, weight)
        weight.requires_grad_(not frozen)
        upstream = torch.randn(N, T, generator=generator(seed), dtype=dtype)
        options = {"temperature": temperature, "banned_ids": banned}
        results = []
        for logp, entropy in (
            token_log_probs(hidden @ weight.T, ids, **options),
            chunked_token_log_probs(hidden, weight, ids, **options, chunk_tokens=chunk),
        ):
            loss = (upstream * logp).sum() + (
                entropy_weight * (upstream.flip(0) * entropy).sum() if entropy_weight else 0
            )
            results.append([logp.detach(), entropy.detach(), *torch.autograd.grad(loss, inputs)])
        for actual, expected, like in zip(results[1], results[0], (ids, ids, hidden, weight), strict=False):
            assert actual.shape == like.shape and actual.dtype == dtype
            torch.testing.assert_close(actual, expected, **tolerance)


def test_no_tensor_of_all_logits_exists_forward_or_backward():
    rng = generator(11)
    tokens, width, vocabulary, chunk = 48, 4, 400, 8
    hidden = torch.randn(2, tokens // 2, width, generator=rng, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=rng, requires_grad=True)
    ids = torch.randint(vocabulary, (2, tokens // 2), generator=rng)

    def largest_storage(chunk_tokens: int) -> int:
        with Recorder() as recorder:
            logp, entropy = chunked_token_log_probs(hidden, weight, ids, banned_ids=[3], chunk_tokens=chunk_tokens)
            torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
        return recorder.largest

    assert chunk * vocabulary - tokens < largest_storage(chunk) <= chunk * vocabulary  # whole columns
    assert largest_storage(tokens) == tokens * vocabulary  # the measure sees what it is meant to exclude


@pytest.mark.parametrize(
    ("frozen", "entropy_weight", "forward", "backward"),
    [(False, 0, 1, 3), (False, 1, 1, 3), (True, 0, 2, 0), (True, 1, 2, 2)],
    ids=["trained", "trained, entropy", "frozen", "frozen, entropy"],
)
def test_products_with_the_vocabulary_are_as_few_as_can_be(frozen, entropy_weight, forward, backward):
    """Trained: logits; logits again, both gradients. Frozen: all in the forward, where the entropy is a metric."""
    hidden, weight, ids = head_inputs(16)
    weight.requires_grad_(not frozen)
    with Recorder() as before:
        logp, entropy = chunked_token_log_probs(hidden, weight, ids, chunk_tokens=4)
    loss = logp.sum() + entropy_weight * entropy.sum() if entropy_weight else logp.sum()
    with Recorder() as after:
        torch.autograd.grad(loss, hidden if frozen else (hidden, weight))
    tiles = -(-V // (4 * V // (N * T)))
    for recorder, products in ((before, forward), (after, backward)):
        assert sum(recorder.names.count(name) for name in ("mm", "addmm_")) == products * tiles


def test_gradients_of_tiles_are_those_of_finite_differences():
    hidden, weight, ids = head_inputs(12)
    for inputs in ((hidden, weight), (hidden, weight.detach())):
        assert torch.autograd.gradcheck(
            lambda hidden, weight: chunked_token_log_probs(
                hidden, weight, ids, temperature=0.8, banned_ids=[1], chunk_tokens=4
            ),
            inputs,
        )


def test_distant_logits_keep_their_precision():
    """Standard deviation 150: the largest logit rises by hundreds from tile to tile."""
    hidden, weight = torch.eye(16), 150 * torch.randn(4096, 16, generator=generator(2))
    ids = torch.arange(16)[None]
    actual = chunked_token_log_probs(hidden[None], weight, ids, chunk_tokens=1)
    expected = token_log_probs((hidden.double() @ weight.double().T)[None], ids)
    torch.testing.assert_close(actual[0].double(), expected[0], atol=1e-4, rtol=1e-6)
    assert (actual[1] - expected[1]).abs().max() < 1e-4


def test_tile_of_banned_tokens_has_no_weight():
    hidden, weight, ids = head_inputs(17)
    options = {"banned_ids": list(range(6)), "chunk_tokens": 3}  # tiles of 2 columns: the first three are banned whole
    actual = chunked_token_log_probs(hidden, weight, ids, **options)
    expected = token_log_probs(hidden @ weight.T, ids, banned_ids=list(range(6)))
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)
    assert actual[0][ids < 6].eq(-100).all()
    gradient = torch.autograd.grad(actual[0].sum() + actual[1].sum(), weight)[0]
    assert gradient.isfinite().all() and (gradient[:6] == 0).all()


def test_backward_can_run_twice():
    hidden, weight, ids = head_inputs(18)
    for inputs in ((hidden, weight), (hidden, weight.detach())):
        leaves = [x for x in inputs if x.requires_grad]
        logp, _ = chunked_token_log_probs(*inputs, ids)
        first = torch.autograd.grad(logp.sum(), leaves, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(2 * logp.sum(), leaves), [2 * x for x in first])


def test_tiles_work_inside_a_checkpoint():
    hidden, weight, ids = head_inputs(19)
    gradients = []

    def log_probs(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return chunked_token_log_probs(hidden, weight, ids, chunk_tokens=4)

    for logp, entropy in (log_probs(hidden, weight), checkpoint(log_probs, hidden, weight, use_reentrant=False)):
        gradients.append(torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_tiles_work_without_gradients_and_without_tokens():
    hidden, weight, ids = head_inputs(13)
    with torch.no_grad():
        logp, entropy = chunked_token_log_probs(hidden, weight, ids, chunk_tokens=4)
    assert not logp.requires_grad and not entropy.requires_grad
    for head in (weight, weight.detach()):
        logp, entropy = chunked_token_log_probs(hidden[:, :0], head, ids[:, :0])
        assert logp.shape == entropy.shape == (N, 0)
        assert not torch.autograd.grad(logp.sum(), hidden)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_raised_after_the_head(dtype):
    """Values as from half-precision logits; gradients as from the same weights in fp64, to one rounding."""
    hidden, weight, ids = head_inputs(14)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    for frozen in (False, True):
        weight.requires_grad_(not frozen)
        actual = chunked_token_log_probs(hidden, weight, ids, temperature=0.7, chunk_tokens=4)
        expected = token_log_probs(hidden @ weight.T, ids, temperature=0.7)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert actual[0].dtype == actual[1].dtype == torch.float32
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight)]
        logp, _ = token_log_probs(exact[0] @ exact[1].T, ids, temperature=0.7)
        leaves = 1 if frozen else 2
        gradients = torch.autograd.grad(actual[0].sum(), (hidden, weight)[:leaves])
        for gradient, wanted in zip(gradients, torch.autograd.grad(logp.sum(), exact[:leaves]), strict=True):
            assert gradient.dtype == dtype
            assert (gradient.double() - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


def test_tiles_are_recomputed_in_the_precision_of_the_forward():
    """Autocast in the forward, in both passes (as under Lightning's bf16-mixed), or in neither."""
    hidden, weight, ids = head_inputs(15, torch.float32)
    results = []
    for log_probs in (
        lambda: token_log_probs(hidden @ weight.T, ids),
        lambda: chunked_token_log_probs(hidden, weight, ids, chunk_tokens=4),
    ):
        for backward in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                logp, _ = log_probs()
            with torch.autocast("cpu", torch.bfloat16, enabled=backward):
                results.append((logp.detach(), *torch.autograd.grad(logp.sum(), (hidden, weight))))
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], atol=1e-5, rtol=1e-5)
        for gradient, expected in zip(result[1:], results[0][1:], strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_temperature_that_is_not_positive_is_refused(temperature):
    hidden, weight, ids = head_inputs()
    message = rf"^temperature is {temperature}; it must be positive \(greedy sampling has no log-probs to train on\)$"
    with pytest.raises(ValueError, match=message):
        token_log_probs(hidden @ weight.T, ids, temperature=temperature)
    with pytest.raises(ValueError, match=message):
        chunked_token_log_probs(hidden, weight, ids, temperature=temperature)


def test_wrong_shape_or_chunk_is_refused_by_name():
    hidden, weight, ids = head_inputs()
    with pytest.raises(
        ValueError, match=r"^logits have shape \(3, 5, 11\), ids \(3, 4\); they must be \(N, T, V\) and"
    ):
        token_log_probs(hidden @ weight.T, ids[:, 1:])
    with pytest.raises(ValueError, match=r"^hidden has shape \(3, 5, 4\), ids \(2, 5\); they must be \(N, T, H\) and"):
        chunked_token_log_probs(hidden, weight, ids[1:])
    with pytest.raises(ValueError, match=r"^chunk_tokens is 0; a tile needs the logits of at least 1 token$"):
        chunked_token_log_probs(hidden, weight, ids, chunk_tokens=0)
