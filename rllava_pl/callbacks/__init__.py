"""What happens around the loop: engines, checkpoints, exports, tables and summaries."""

from rllava_pl.rollout.lifecycle import RolloutCallback, TransformersRollout

__all__ = ["RolloutCallback", "TransformersRollout"]
