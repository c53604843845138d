"""Rewards in worker processes that can be killed: pool, fork server, workers and their protocol."""
