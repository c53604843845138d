"""Rewards in worker processes that can be killed.

The trainer starts one fork server, which builds the rewards; each worker is a copy of it, so replacing a killed worker
takes milliseconds. The pool hands rollouts to workers, watches their deadlines and replaces workers that fail.
"""
