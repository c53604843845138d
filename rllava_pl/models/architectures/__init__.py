"""Published architectures: the ``config.json`` of known checkpoints, for planning and benchmarks without a download.

The JSON files state shapes as their checkpoints publish them; there are no weights and no tokenizers here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CHECKPOINTS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl_3b",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl_4b",
    "Qwen/Qwen3-VL-4B-Thinking": "qwen3_vl_4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl_8b",
    "Qwen/Qwen3-VL-8B-Thinking": "qwen3_vl_8b",
}
"""Hub ids and the architecture they are weights of."""


def names() -> list[str]:
    """Names of the architectures that are shipped."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.json"))


def architecture(name: str) -> PreTrainedConfig:
    """The config of a shipped architecture, e.g. ``qwen3_vl_4b``.

    Raises:
        ValueError: There is no such architecture; says which there are.
    """
    from transformers import AutoConfig

    if name not in names():
        raise ValueError(f"no architecture {name!r} is shipped; there are {', '.join(names())}")
    return AutoConfig.for_model(**json.loads((Path(__file__).parent / f"{name}.json").read_text("utf-8")))


def config_of(path: str, revision: str = "main") -> PreTrainedConfig:
    """The config of a model: of a directory, of a known checkpoint without asking the hub, else from the hub.

    Raises:
        OSError: ``path`` is neither, and the hub does not know it or cannot be reached.
    """
    from transformers import AutoConfig

    known = CHECKPOINTS.get(path, path)
    if not Path(path).is_dir() and known in names():
        return architecture(known)
    return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
