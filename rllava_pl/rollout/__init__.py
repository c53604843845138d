"""Engines that draw completions from the policy, and the callbacks that keep them in step with it."""
