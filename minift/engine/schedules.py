"""The learning rate after the warm-up: each function here is the schedule of its name in tables.SCHEDULES.

It is given the share of the steps after the warm-up that is done, 0 to 1, and returns a factor on the peak.
"""

import math


def linear(done: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1 - done


def cosine(done: float) -> float:
    """From 1 to 0 along half a cosine (SGDR without restarts, https://arxiv.org/abs/1608.03983)."""
    return (1 + math.cos(math.pi * done)) / 2


def constant(done: float) -> float:
    """1 throughout."""
    return 1.0
