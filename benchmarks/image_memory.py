"""Peak memory of checking and loading the largest allowed images, each in a new process (Linux).

python -m benchmarks.image_memory
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.datamodules.test_hostile_images import LARGE, code_of, growth_mib


def in_a_child(action: Callable[[], object]) -> None:
    """Run in a forked process, whose memory is separate, and wait for it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"the process failed with status {status}")


def main() -> None:
    """Print one line per kind of image."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image"

        def measure(name: str) -> None:
            data = file.read_bytes()
            print(f"{name:16} {growth_mib(lambda: code_of(data)):.0f} MiB", flush=True)

        for name, make in LARGE.items():
            in_a_child(lambda make=make: file.write_bytes(make()))
            in_a_child(lambda name=name: measure(name))


if __name__ == "__main__":
    main()
