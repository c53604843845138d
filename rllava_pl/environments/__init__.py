"""Worlds in which an episode takes several turns."""
