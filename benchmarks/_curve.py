"""The validation curve of a run, kept by a callback that any config can name."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class Curve(Callback):
    """Keeps the metrics of every validation, and ends the run above a threshold.

    Args:
        monitor: The metric that can end the run, the larger the better.
        stop_at: Value that ends the run; above 1: the run continues to its last rollout.
    """

    def __init__(self, monitor: str = "val/accuracy", stop_at: float = 2.0) -> None:
        self.monitor, self.stop_at = monitor, stop_at
        self.points: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One more point: rollouts, updates and batches of prompts so far, and every metric of the validation split.

        Dynamic sampling may take several batches of prompts for one rollout batch.
        """
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        counts = {"rollouts": pl_module.state.rollouts, "updates": pl_module.state.updates}
        self.points.append(counts | {"batches": trainer.fit_loop.total_batch_idx + 1} | metrics)
        if metrics[self.monitor] >= self.stop_at:
            trainer.should_stop = True
