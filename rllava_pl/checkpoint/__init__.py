"""Checkpoints that are complete or absent: atomic directories, manifest, and plain-data encoding of rollouts."""
