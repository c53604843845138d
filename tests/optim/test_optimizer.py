"""HostAdamW equals torch's AdamW, with direct and staged copies."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LinearLR

from rllava_pl.functional.rounding import TABLE_SIZE
from rllava_pl.optim import HostAdamW
from rllava_pl.optim import host_adamw as module
from rllava_pl.optim.transfer import StagedTransfer
from rllava_pl.strategies.adapter import adapter_for

Make = Callable[[list[dict[str, object]]], Optimizer]
MODES = ("float32", "bfloat16", "int8")


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies as on an accelerator, with buffers so small that tensors are copied in chunks."""
    monkeypatch.setattr(module, "transfer_for", partial(StagedTransfer, buffer_bytes=4 * TABLE_SIZE))


class Net(nn.Module):
    """A tied embedding, a weight of several chunks, one that is never used and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 64)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.wide = nn.Linear(64, TABLE_SIZE // 64 + 33)
        self.back = nn.Linear(TABLE_SIZE // 64 + 33, 64)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, ids_NT: Tensor) -> Tensor:
        hidden = self.embedding(ids_NT)
        hidden = self.frozen(hidden + self.back(torch.tanh(self.wide(hidden))))
        return (hidden @ self.embedding.weight.T).float()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups, as for a policy and a critic."""
    rest = [p for name, p in model.named_parameters() if "wide" not in name]
    return [{"params": rest}, {"params": list(model.wide.parameters()), "lr": 1e-4, "weight_decay": 0.1}]


def batches(steps: int, seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 11, (4, 3), generator=generator) for _ in range(steps))


def loss(model: Net, ids_NT: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids_NT).flatten(0, 1), (3 * ids_NT + 1).remainder(11).flatten())


def train(model: Net, optimizer: Optimizer, steps: int, seed: int = 1, max_norm: float = 1.0) -> list[float]:
    """Two micro-batches a step, clipping, a schedule; returns losses and norms."""
    schedule, log = LinearLR(optimizer, 1.0, 0.1, total_iters=50), []
    for ids_NT in batches(steps, seed):
        parts = [loss(model, part) / 2 for part in ids_NT.to(model.unused.weight.device).chunk(2)]
        for part in parts:
            part.backward()
        norm = adapter_for(SingleDeviceStrategy()).clip_grad_norm(optimizer, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        log += [float(sum(parts).detach()), float(norm)]
    return log


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


plain = partial(AdamW, lr=1e-3, fused=True)
host = partial(HostAdamW, lr=1e-3)


def test_fifty_steps_equal_adamw_bit_by_bit() -> None:
    ours, theirs = net(), net()
    log = train(ours, host(groups(ours)), 50)
    assert log == train(theirs, plain(groups(theirs)), 50)
    assert equal(ours, theirs)
    assert any(norm > 1.0 for norm in log[1::2])  # some were clipped
    assert log[-2] < log[0] / 2


def test_staged_copies_give_the_same_bits_as_adamw(staged: None) -> None:
    """On a CPU streams do nothing; threads, chunks and buffers are as on a GPU."""
    ours, theirs = net(), net()
    assert train(ours, host(groups(ours)), 8) == train(theirs, plain(groups(theirs)), 8)
    assert equal(ours, theirs)


@pytest.mark.parametrize("states", MODES)
def test_staged_copies_of_bf16_weights_equal_direct_ones(
    monkeypatch: pytest.MonkeyPatch, states: str, request: pytest.FixtureRequest
) -> None:
    direct, staged = net(torch.bfloat16), net(torch.bfloat16)
    log = train(direct, host(groups(direct), states=states), 4)
    request.getfixturevalue("staged")
    assert log == train(staged, host(groups(staged), states=states), 4)
    assert equal(direct, staged)


@pytest.mark.gpu
def test_training_on_a_gpu_matches_the_cpu() -> None:
    """Gradients differ in their last bits, so the weights do; masters and weights are equal."""
    far, near = net().cuda(), net()
    optimizer = host(groups(far))
    logs = [train(model, o, 8) for model, o in ((far, optimizer), (near, plain(groups(near))))]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3)
    for p, q in zip(far.parameters(), near.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, atol=1e-4, rtol=1e-3)
    masters = [state.tensors()["master"] for state in optimizer.state.values()]
    assert all(x.device.type == "cpu" for x in masters)
    assert all(torch.equal(x, p.detach().cpu().view(-1)) for p, x in zip(optimizer.state, masters, strict=True))


def test_bf16_weights_equal_rounded_fp32_weights() -> None:
    """Gradients come from a model in bf16; the weights are those of AdamW in fp32 fed with them."""
    model = net(torch.bfloat16)
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    ours, theirs = host(model.parameters()), plain(masters)
    for ids_NT in batches(5):
        for part in ids_NT.chunk(2):
            for p, q in zip(model.parameters(), masters, strict=True):
                if (
                    p.requires_grad
                    and (g := torch.autograd.grad(loss(model, part), p, allow_unused=True)[0]) is not None
                ):
                    q.grad = g.float() if q.grad is None else q.grad + g.float()
            loss(model, part).backward()
        ours.step(), ours.zero_grad(), theirs.step(), theirs.zero_grad()
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(model.parameters(), masters, strict=True))


@pytest.mark.parametrize("states", MODES)
def test_number_of_micro_batches_does_not_change_the_weights(states: str) -> None:
    """Gradients of whole numbers add up without rounding, so 1, 2 and 8 micro-batches must give equal bits."""
    ends = []
    for parts in (1, 2, 8):
        weight = nn.Parameter(torch.linspace(-1, 1, 600).view(20, 30))
        optimizer = host([weight], states=states)
        for step in range(6):
            x = torch.arange(160.0).view(8, 20).add_(step).remainder_(7)
            for part in x.chunk(parts):
                (part @ weight).sum().backward()
                assert weight.grad is None  # the accelerator keeps no gradient
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weight.detach())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("states", ["bfloat16", "int8"])
def test_rounding_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch, states: str) -> None:
    """A run may be resumed with a later version that has another chunk size."""
    ends = []
    for chunk in (TABLE_SIZE, TABLE_SIZE // 2, TABLE_SIZE // 16):
        monkeypatch.setattr(module, "CHUNK", chunk)
        weight = nn.Parameter(torch.linspace(-1, 1, TABLE_SIZE + 999).bfloat16())
        optimizer = host([weight], states=states)
        for _ in range(2):
            weight.square().sum().backward()
            optimizer.step()
        ends.append([weight, *optimizer.state[weight].tensors().values()])
    assert all(torch.equal(x, y) for x, y in zip(ends[0], ends[1], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(ends[0], ends[2], strict=True))


def test_discarded_gradients_leave_no_trace() -> None:
    """Moments and step counts are unchanged as well."""
    disturbed, quiet = net(), net()
    ours, theirs = host(groups(disturbed)), host(groups(quiet))
    train(disturbed, ours, 2), train(quiet, theirs, 2)
    for ids_NT in batches(2):
        (loss(disturbed, ids_NT) * float("nan")).backward()
    assert not adapter_for(SingleDeviceStrategy()).clip_grad_norm(ours, 1.0).isfinite()
    adapter_for(SingleDeviceStrategy()).discard_gradients(ours)
    ours.step()  # nothing to do
    assert train(disturbed, ours, 2, seed=2) == train(quiet, theirs, 2, seed=2)
    assert equal(disturbed, quiet)


def test_a_failed_backward_pass_leaves_no_trace_after_discarding(staged: None) -> None:
    """As when memory runs out: some gradients have been copied to the host."""
    disturbed, quiet = net(), net()
    ours, theirs = host(groups(disturbed)), host(groups(quiet))
    handle = disturbed.wide.bias.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(disturbed, next(batches(1))).backward()
    assert ours._gradients.get(disturbed.back.weight) is not None
    handle.remove()
    adapter_for(SingleDeviceStrategy()).discard_gradients(ours)
    assert train(disturbed, ours, 2) == train(quiet, theirs, 2)
    assert equal(disturbed, quiet)


def test_a_parameter_without_gradient_has_no_state() -> None:
    model = net()
    optimizer = host(groups(model))
    train(model, optimizer, 1)
    trained = {id(p) for p in optimizer.state}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith(("unused", "frozen"))}


def test_fp32_weights_on_the_host_have_no_master_copy() -> None:
    model = net()
    optimizer = host(groups(model))
    train(model, optimizer, 1)
    for p, state in optimizer.state.items():
        tensors = state.tensors()
        assert set(tensors) == {"step", "exp_avg", "exp_avg_sq"}
        assert sum(x.nbytes for x in tensors.values()) == 2 * p.nbytes + 4


@pytest.mark.parametrize(("states", "size"), [("float32", 12.0), ("bfloat16", 8.0), ("int8", 2 + 8 / 256)])
def test_bytes_per_parameter_are_those_of_the_table(states: str, size: float) -> None:
    weight = nn.Parameter(torch.zeros(2, 3 * TABLE_SIZE // 2, dtype=torch.bfloat16))
    optimizer = host([weight], states=states)
    weight.sum().backward()
    optimizer.step()
    assert sum(x.nbytes for x in optimizer.state[weight].tensors().values()) == size * weight.numel() + 4


def saved(state: dict[str, object]) -> dict[str, object]:
    """Through a file that holds plain tensors only."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("states", MODES)
def test_a_resumed_optimizer_continues_bit_by_bit(states: str, dtype: torch.dtype) -> None:
    whole, resumed = net(dtype), net(dtype)
    first = host(groups(whole), states=states)
    train(whole, first, 2)
    resumed.load_state_dict(saved(whole.state_dict()))
    second = host(groups(resumed), states=states)
    second.load_state_dict(saved(first.state_dict()))
    assert train(whole, first, 2, seed=2) == train(resumed, second, 2, seed=2)
    assert equal(whole, resumed)
    ends = [optimizer.state_dict()["state"] for optimizer in (first, second)]
    assert all(torch.equal(x, ends[1][k][name]) for k, state in ends[0].items() for name, x in state.items())


def test_a_checkpoint_with_other_states_is_refused() -> None:
    model = net()
    optimizer = host(groups(model))
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"'exp_avg' of the checkpoint is float32.* states: bfloat16 needs bfloat16"):
        host(groups(model), states="bfloat16").load_state_dict(optimizer.state_dict())
    other = net(torch.bfloat16)
    with pytest.raises(ValueError, match="'master' of the checkpoint is absent, but states: float32 needs float32"):
        host(groups(other)).load_state_dict(optimizer.state_dict())


def test_lightning_does_not_move_the_state_to_the_accelerator() -> None:
    """After a resume it moves the states of optimizers to the accelerator, where these would not fit."""
    model = net()
    optimizer = host(groups(model))
    train(model, optimizer, 1)
    _optimizers_to_device([optimizer], torch.device("meta"))
    assert all(x.device.type == "cpu" for state in optimizer.state.values() for x in state.tensors().values())
    train(model, optimizer, 1)


@pytest.mark.parametrize("states", MODES)
def test_states_are_on_the_host_with_another_default_device(staged: None, states: str) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    gradient = torch.ones(3, dtype=torch.bfloat16)
    with torch.device("meta"):
        optimizer = host([weight], lr=0.1, states=states)
        weight.grad = gradient
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    assert all(x.device.type == "cpu" for x in optimizer.state[weight].tensors().values())
    assert (weight < 1).all()


def test_weights_without_master_follow_updates_below_their_spacing() -> None:
    """Near 1 the next bf16 numbers are 2**-8 below and 2**-7 above; 40 updates of 1e-5 move the mean by 4e-4."""
    weight = nn.Parameter(torch.ones(TABLE_SIZE, dtype=torch.bfloat16))
    optimizer = HostAdamW([weight], lr=1e-5, weight_decay=0.0, states="int8")
    for _ in range(40):
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(weight.detach().double().mean()) == pytest.approx(1 - 4e-4, abs=2e-5)
    assert float((weight == 1).double().mean()) > 0.8


@pytest.mark.parametrize("gradients", ["float32", "bfloat16"])
@pytest.mark.parametrize("states", ["bfloat16", "int8"])
def test_rounded_states_reach_the_loss_of_exact_ones(states: str, gradients: str) -> None:
    exact, rounded = net(), net()
    expected = train(exact, host(groups(exact)), 12)
    log = train(rounded, host(groups(rounded), states=states, gradients=gradients), 12)
    assert log[-2] == pytest.approx(expected[-2], rel=0.02)
    assert log[-2] < 0.5 * log[0]


def test_a_new_optimizer_replaces_the_hooks_of_an_older_one() -> None:
    """Each fit makes an optimizer; an older one must not receive its gradients."""
    model, alone = net(), net()
    old = host(groups(model))
    train(model, host(groups(model)), 2)
    train(alone, host(groups(alone)), 2)
    assert equal(model, alone)
    assert not old.state


def test_gradients_assigned_to_grad_are_used() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(host([weight]).clip_grad_norm_(1.0)) == 5.0


def test_a_backward_pass_after_clipping_is_refused() -> None:
    """Scaled and unscaled gradients would be added."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = host([weight])
    weight.sum().backward()
    optimizer.clip_grad_norm_(0.1)
    with pytest.raises(RuntimeError, match="a backward pass after clipping"):
        weight.sum().backward()


def test_an_error_in_the_worker_thread_is_raised_at_the_next_call(
    staged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers stay usable."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = host([weight])
    monkeypatch.setattr("rllava_pl.optim.gradients.spans", lambda *_: 1 / 0)
    for _ in range(3):  # more than there are buffers
        weight.sum().backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, dtype=torch.float64), "float32 or bfloat16; one of shape .2,. is torch.float64"),
        (torch.zeros(2, 3).T, "contiguous weights; one of shape .3, 2. has strides .1, 3."),
    ],
    ids=["float64", "transposed"],
)
def test_float64_and_non_contiguous_weights_are_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host([nn.Parameter(weight)])


def test_an_unsupported_device_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, device="meta"))
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(ValueError, match="supports weights on cpu and cuda, these are on meta"):
        host([weight]).step()


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="states is 'fp8'; it is one of float32, bfloat16, int8"):
        host([nn.Parameter(torch.zeros(1))], states="fp8")


def test_strategies_that_exchange_gradients_are_refused() -> None:
    optimizer = host([nn.Parameter(torch.zeros(1))])
    adapter_for(SingleDeviceStrategy()).check_optimizer(optimizer)
    adapter_for(DDPStrategy()).check_optimizer(plain([nn.Parameter(torch.zeros(1))]))
    with pytest.raises(ValueError, match="HostAdamW moves gradients away before DDPStrategy can exchange them"):
        adapter_for(DDPStrategy()).check_optimizer(optimizer)
