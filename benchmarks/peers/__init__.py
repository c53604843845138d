"""The competitors of the step-time comparison; each has ``run(work, pace)``."""
