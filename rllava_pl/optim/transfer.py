"""Copies between a device and the host: none on a CPU, through pinned buffers and a side stream elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

Receiver = Callable[[slice, Tensor], None]
"""Called with a span of a flat tensor and its values in host memory, which are valid during the call only."""

BUFFER_BYTES = 64 * 2**20
"""Size of a staging buffer; larger tensors are copied in chunks. Pinned memory cannot be swapped, so it is small."""


def spans(n: int, size: int) -> Iterator[slice]:
    """``range(n)`` in chunks of at most ``size``."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class Transfer(Protocol):
    """Copies flat tensors between one device and the host."""

    def to_host(self, x: Tensor, receive: Receiver) -> None:
        """Call ``receive`` with all of ``x``, now or later; ``x`` must not be written to after this call."""

    def wait(self) -> None:
        """Return once all copies to the host were received; raises what a receiver raised."""

    def read(self, x: Tensor) -> Tensor:
        """``x`` in host memory, valid until the next call."""

    def write(self, x: Tensor, to: Tensor) -> None:
        """Copy host memory to the device, in the order of calls; ``x`` may be reused after this call."""

    def flush(self) -> None:
        """Make later work on the device wait for what was written."""


class DirectTransfer:
    """The device is the host: tensors are passed without a copy."""

    def to_host(self, x: Tensor, receive: Receiver) -> None:
        """Call ``receive`` at once."""
        receive(slice(0, len(x)), x)

    def wait(self) -> None:
        """Everything was received at once."""

    def read(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def write(self, x: Tensor, to: Tensor) -> None:
        """Copy, unless it is the same memory."""
        if x.data_ptr() != to.data_ptr():
            to.copy_(x)

    def flush(self) -> None:
        """Everything was written at once."""


class StagedTransfer:
    """Copies through two pinned buffers on a side stream while the device computes; a worker thread receives.

    The worker holds a reference to each tensor until its copy is complete, so its memory is not reused before. On a CPU
    streams and events do nothing; the rest is as on a GPU.

    Args:
        device: Device of the tensors.
        buffer_bytes: Size of each of the two buffers.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-optimizer")
        self._pending: list[Future[None]] = []
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()
        self._buffer_bytes = buffer_bytes
        pinned = device.type == "cuda"
        for _ in range(2):
            self._buffers.put(torch.empty(buffer_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned))

    def to_host(self, x: Tensor, receive: Receiver) -> None:
        """Start the copies; waits only while both buffers are in use."""
        for span in spans(len(x), self._buffer_bytes // x.itemsize):
            buffer = self._buffers.get()
            chunk, copied = self._copy(x[span], buffer)
            self._pending.append(self._worker.submit(self._receive, x, buffer, chunk, copied, span, receive))

    def wait(self) -> None:
        """Return once all copies to the host were received; raises what a receiver raised."""
        pending, self._pending = self._pending, []
        for job in pending:
            job.result()

    def read(self, x: Tensor) -> Tensor:
        """Copy, and wait for the copy."""
        buffer = self._buffers.get()
        chunk, copied = self._copy(x, buffer)
        copied.synchronize()
        self._buffers.put(buffer)
        return chunk

    def write(self, x: Tensor, to: Tensor) -> None:
        """Fill a buffer and start its copy; the buffer is reused after that."""
        buffer = self._buffers.get()
        chunk = buffer[: to.nbytes].view(to.dtype).copy_(x)
        with self._on_side_stream() as copied:
            to.copy_(chunk, non_blocking=True)
        self._pending.append(self._worker.submit(self._release, buffer, copied))

    def flush(self) -> None:
        """Make the device's main stream wait for the side stream."""
        self._backend.current_stream().wait_stream(self._stream)

    def _copy(self, x: Tensor, buffer: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        chunk = buffer[: x.nbytes].view(x.dtype)
        with self._on_side_stream() as copied:
            chunk.copy_(x, non_blocking=True)
        return chunk, copied

    @contextmanager
    def _on_side_stream(self) -> Iterator[torch.cuda.Event]:
        """Run after all earlier work of the main stream; the event marks the end."""
        self._stream.wait_stream(self._backend.current_stream())
        event = self._backend.Event()
        with self._backend.stream(self._stream):
            yield event
            event.record(self._stream)

    def _receive(
        self, x: Tensor, buffer: Tensor, chunk: Tensor, copied: torch.cuda.Event, span: slice, receive: Receiver
    ) -> None:
        try:
            copied.synchronize()
            receive(span, chunk)
        finally:
            self._buffers.put(buffer)

    def _release(self, buffer: Tensor, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._buffers.put(buffer)


def transfer_for(device: torch.device) -> Transfer:
    """The transfer that suits a device.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA GPU.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"HostAdamW supports weights on cpu and cuda, these are on {device}; use torch.optim.AdamW")
    return DirectTransfer() if device.type == "cpu" else StagedTransfer(device)
