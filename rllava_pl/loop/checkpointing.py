"""What of a run goes into a checkpoint beside what Lightning stores, and how it comes back."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from rllava_pl.checkpoint import manifest
from rllava_pl.checkpoint.batch_progress import begin_anew
from rllava_pl.distributed.collectives import gather_objects, rank
from rllava_pl.loop.interruption import Interruption

Checkpoint = dict[str, Any]


class Checkpointing(Interruption):
    """Lightning's hooks for the state of ``RLModule``."""

    _saved_at_ns = 0

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep what training changes; frozen weights and the reference come from the policy's own checkpoint again."""
        if checkpoint["state_dict"]:  # else the strategy saves weights in its own way
            frozen = self._frozen_names()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint["kl_factor"] = self.kl_controller.coef
        checkpoint["collection"] = self.collection.state() if self.collection.max_refills else []
        checkpoint["tally"] = gather_objects(self.tally.state()) if self.collection.rounds else []
        checkpoint[manifest.FACTS] = self._facts()
        begin_anew(checkpoint["loops"]["fit_loop"], self.trainer)

    def _facts(self) -> dict[str, int | str]:
        """For the manifest. A later checkpoint of a run is the newer one, also if it moved to a slower clock."""
        self._saved_at_ns = max(time.time_ns(), self._saved_at_ns + 1)
        options = json.dumps(dict(self.hparams), sort_keys=True, default=str)
        return {
            "rollouts": self.rollout_index,
            "updates": self.weight_version,
            "config_sha256": hashlib.sha256(options.encode()).hexdigest(),
            "saved_at_ns": self._saved_at_ns,
        }

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Fill in the frozen weights, so that loading stays strict about everything else.

        Raises:
            ValueError: The run has another seed, or ranks have read different checkpoints.
        """
        seed = checkpoint.get("hyper_parameters", {}).get("seed", self.seed)
        if seed != self.seed:
            raise ValueError(
                f"the checkpoint was made with seed {seed}, this run has seed {self.seed}: it would go on with other "
                "samples in another order; pass the same seed (--seed_everything)"
            )
        facts = checkpoint.get(manifest.FACTS, {})
        self._saved_at_ns = facts.get("saved_at_ns", 0)
        if len(set(gather_objects(self._saved_at_ns))) > 1:
            raise ValueError("ranks read different checkpoints; all need the same directory, on a shared file system")
        self.configure_model()
        if checkpoint["state_dict"]:  # else the strategy has loaded them
            present = self.state_dict()
            checkpoint["state_dict"] |= {name: present[name] for name in self._frozen_names()}
        self.kl_controller.coef = checkpoint.get("kl_factor", 1.0)
        self.collection.restore(checkpoint.get("collection", []), rank())
        if tallies := checkpoint.get("tally"):
            self.tally.restore(tallies[rank()])

    def _frozen_names(self) -> set[str]:
        kept = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        kept |= {"rollouts_done", "updates_done"}
        return set(self.state_dict()) - kept
