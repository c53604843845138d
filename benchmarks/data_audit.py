"""The cost of checking a data set: CPU time a row, and memory, which must not grow with the number of images.

    python benchmarks/data_audit.py
    python benchmarks/data_audit.py --rows 500 --scale 2

Every kind of row is audited twice, with ``rows`` and with ``scale`` times as many, by the code that ``fit`` and
``check-data`` run. The images are files on disk, a hundred different ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from rllava_pl.datamodules import PromptDataModule

IMAGES = 100
KINDS = {"text": "", "JPEG 640 x 480": "jpg", "PNG 640 x 480": "png", "WebP 640 x 480": "webp"}


def main(args: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Print one line per kind of rows; returns milliseconds a row and the MiB that additional rows cost, by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--scale", type=int, default=5)
    options = parser.parse_args(args)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, suffix in KINDS.items():
            _write_images(folder, suffix)
            _audit(folder, suffix, options.rows)  # warm
            few_ms, few_mib = _audit(folder, suffix, options.rows)
            many_ms, many_mib = _audit(folder, suffix, options.rows * options.scale)
            results[kind] = (min(few_ms, many_ms), many_mib - few_mib)
            rows = f"{options.rows} / {options.rows * options.scale} rows"
            print(
                f"{kind:16} {rows}: {few_ms:.3f} / {many_ms:.3f} ms of CPU a row, {results[kind][1]:+.1f} MiB",
                flush=True,
            )
    return results


def _write_images(folder: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    for k in range(IMAGES if suffix else 0):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{k}.{suffix}")


def _audit(folder: Path, suffix: str, rows: int) -> tuple[float, float]:
    """Milliseconds of CPU a row, and resident memory in MiB at the end."""
    images = [{"images": f"{k}.{suffix}"} if suffix else {} for k in range(IMAGES)]
    lines = (json.dumps({"prompt": f"Question {k}?", "answer": "4", **images[k % IMAGES]}) for k in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    start = time.process_time()
    audited = PromptDataModule(train=str(folder / "rows.jsonl")).audit("train")
    spent = time.process_time() - start
    if len(audited) != rows:
        raise RuntimeError(f"valid rows were refused: {audited.rejections[:3]}")
    status = Path("/proc/self/status").read_text().splitlines()
    return 1e3 * spent / rows, next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
