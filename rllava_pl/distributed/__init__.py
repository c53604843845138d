"""Processes of one run: collectives, shards of tensors, signals, and detection of failed ranks."""
