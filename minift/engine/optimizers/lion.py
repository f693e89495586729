"""Lion (Chen et al., https://arxiv.org/abs/2302.06675, algorithm 2), with g the gradient:

    p = p - lr (sign(b1 m + (1 - b1) g) + decay p)        m = b2 m + (1 - b2) g

Every number moves by lr, whatever its gradient. Such steps are larger than AdamW's, so the authors advise a learning
rate 3 to 10 times smaller, and a decay as many times larger. There is one state where AdamW has two.
"""

import torch
from torch import Tensor

from . import unless

DEFAULTS = {"beta1": 0.9, "beta2": 0.99}
LR = 0.2
MATRICES = False
RECORDABLE = True


def begin(p: Tensor, group: dict) -> dict[str, Tensor]:
    """m."""
    return {"exp_avg": torch.zeros_like(p)}


def update(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, skip: Tensor | None) -> None:
    """One update, in place."""
    lr = group["lr"]
    for p, g, state in zip(params, grads, states, strict=True):
        m = state["exp_avg"]
        with unless(skip, p, m):
            direction = m.lerp(g, 1 - group["beta1"]).sign_()
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(direction.mul_(lr))
            m.lerp_(g, 1 - group["beta2"])
