"""What happens around the loop: engines, checkpoints, exports, tables and summaries."""

from rllava_pl.callbacks.checkpoint import RolloutCheckpoint
from rllava_pl.callbacks.export import ExportHF
from rllava_pl.callbacks.memory_report import MemoryReport
from rllava_pl.callbacks.progress import RolloutProgressBar
from rllava_pl.callbacks.rollout_table import RolloutTable
from rllava_pl.callbacks.summary import RunSummary
from rllava_pl.callbacks.vllm import VLLMRollout, VLLMServerRollout
from rllava_pl.callbacks.watchdog import Watchdog
from rllava_pl.callbacks.writer import RolloutWriter
from rllava_pl.rollout.callbacks import RolloutCallback, TransformersRollout

__all__ = [
    "ExportHF",
    "MemoryReport",
    "RolloutCallback",
    "RolloutCheckpoint",
    "RolloutProgressBar",
    "RolloutTable",
    "RolloutWriter",
    "RunSummary",
    "TransformersRollout",
    "VLLMRollout",
    "VLLMServerRollout",
    "Watchdog",
]
