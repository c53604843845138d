"""Ways between a device and the host: nothing to carry on a CPU, pinned memory and a side stream elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

Receiver = Callable[[slice, Tensor], None]
"""Takes a stretch of a flat tensor, as host memory that is valid during the call only."""

STAGE_BYTES = 64 * 2**20
"""Size of a staging buffer; larger tensors go in pieces. Pinned memory cannot be swapped, so it is kept small."""


def spans(n: int, size: int) -> Iterator[slice]:
    """``range(n)`` in stretches of at most ``size``."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class Lane(Protocol):
    """Carries flat tensors between one device and the host."""

    def collect(self, x: Tensor, receive: Receiver) -> None:
        """Have ``receive`` called with all of ``x``, now or later; ``x`` must not be written to any more."""

    def wait(self) -> None:
        """Return once everything collected was received; raises what a receiver raised."""

    def fetch(self, x: Tensor) -> Tensor:
        """``x`` in host memory, at once; valid until the next call."""

    def deliver(self, x: Tensor, to: Tensor) -> None:
        """Write host memory to the device, in the order of calls; ``x`` may be reused at once."""

    def flush(self) -> None:
        """Let the device's work from here on see what was delivered."""


class DirectLane:
    """The device is the host: tensors are handed over as they are."""

    def collect(self, x: Tensor, receive: Receiver) -> None:
        """Receive at once, without a copy."""
        receive(slice(0, len(x)), x)

    def wait(self) -> None:
        """Nothing is under way."""

    def fetch(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def deliver(self, x: Tensor, to: Tensor) -> None:
        """Copy, unless it is the same memory."""
        if x.data_ptr() != to.data_ptr():
            to.copy_(x)

    def flush(self) -> None:
        """Nothing is under way."""


class StagedLane:
    """Copies through two pinned buffers on a side stream, while the device computes; one worker thread receives.

    The worker holds on to a collected tensor until its copy has arrived, so the device's memory is not reused before.
    On a CPU streams and events do nothing, and the rest runs as it does elsewhere.

    Args:
        device: Where the tensors are.
        stage_bytes: Of each of the two buffers.
    """

    def __init__(self, device: torch.device, stage_bytes: int = STAGE_BYTES) -> None:
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-optimizer")
        self._under_way: list[Future[None]] = []
        self._stages: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(2):
            self._stages.put(
                torch.empty(stage_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
            )
        self._stage_bytes = stage_bytes

    def collect(self, x: Tensor, receive: Receiver) -> None:
        """Start the copy; waits only while both buffers are full."""
        for span in spans(len(x), self._stage_bytes // x.itemsize):
            stage = self._stages.get()
            piece, arrived = self._copy(x[span], stage)
            self._under_way.append(self._worker.submit(self._receive, x, stage, piece, arrived, span, receive))

    def wait(self) -> None:
        """Return once everything collected was received; raises what a receiver raised."""
        under_way, self._under_way = self._under_way, []
        for job in under_way:
            job.result()

    def fetch(self, x: Tensor) -> Tensor:
        """Copy and wait for it."""
        stage = self._stages.get()
        piece, arrived = self._copy(x, stage)
        arrived.synchronize()
        self._stages.put(stage)
        return piece

    def deliver(self, x: Tensor, to: Tensor) -> None:
        """Fill a buffer, start its copy, and have it back in use once that is done."""
        stage = self._stages.get()
        piece = stage[: to.nbytes].view(to.dtype).copy_(x)
        with self._aside() as done:
            to.copy_(piece, non_blocking=True)
        self._under_way.append(self._worker.submit(self._release, stage, done))

    def flush(self) -> None:
        """The device's main stream waits for the side stream."""
        self._backend.current_stream().wait_stream(self._stream)

    def _copy(self, x: Tensor, stage: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        piece = stage[: x.nbytes].view(x.dtype)
        with self._aside() as arrived:
            piece.copy_(x, non_blocking=True)
        return piece, arrived

    @contextmanager
    def _aside(self) -> Iterator[torch.cuda.Event]:
        """Onto the side stream, behind what the main stream was given so far; the event marks the end."""
        self._stream.wait_stream(self._backend.current_stream())
        event = self._backend.Event()
        with self._backend.stream(self._stream):
            yield event
            event.record(self._stream)

    def _receive(
        self, x: Tensor, stage: Tensor, piece: Tensor, arrived: torch.cuda.Event, span: slice, receive: Receiver
    ) -> None:
        try:
            arrived.synchronize()
            receive(span, piece)
        finally:
            self._stages.put(stage)

    def _release(self, stage: Tensor, done: torch.cuda.Event) -> None:
        done.synchronize()
        self._stages.put(stage)


def lane_to(device: torch.device) -> Lane:
    """The lane that suits a device.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA GPU.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"HostAdamW knows the way to cpu and cuda, the weights are on {device}; use torch.optim.AdamW")
    return DirectLane() if device.type == "cpu" else StagedLane(device)
