"""Stochastic gradient descent with momentum (Polyak 1964; as torch.optim.SGD), with g the gradient:

    g = g + decay p        m = b1 m + g        p = p - lr m

The decay goes through the momentum, as L2 regularisation does. --beta1 0 keeps no m: then there is no state at all.
The update is PyTorch's fused one. Steps follow the gradient's size, which for transformers is small and differs from
layer to layer: they need a larger learning rate than AdamW's, whose steps do not.
"""

import torch
from torch import Tensor

DEFAULTS = {"beta1": 0.9}
LR = 100.0
MATRICES = False
RECORDABLE = True


def begin(p: Tensor, group: dict) -> dict[str, Tensor]:
    """m, under torch.optim's name."""
    if group["beta1"] == 0:
        return {}
    return {"momentum_buffer": torch.zeros_like(p)}


def update(params: list[Tensor], grads: list[Tensor], states: list[dict], group: dict, skip: Tensor | None) -> None:
    """One update, in place."""
    m = [state["momentum_buffer"] for state in states if state]
    settings = dict(lr=group["lr"], momentum=group["beta1"], weight_decay=group["weight_decay"])
    settings |= dict(dampening=0.0, nesterov=False, maximize=False)
    # not the first step: m begins at 0, so that the first one is g
    torch._fused_sgd_(params, grads, m, **settings, is_first_step=False, found_inf=skip)
