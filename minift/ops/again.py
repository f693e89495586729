"""Outputs that backward makes again, by one elementwise pass, where autograd would keep them.

    y = again(gelu(x), make)      make() gives y once more, from tensors that are kept anyway
    with lean():                  whoever saves y for backward in here, a linear layer for the gradient of its weight,
        loss = ...                keeps make and not y

A layer of width C keeps 10 C numbers a token instead of 16 C where all weights are trained: not the activation's output
(4 C) and those of two norms. The same kernel makes the same bits, in about 1 % of a step's time (the cheap end of what
Korthikanti et al. recompute, https://arxiv.org/abs/2205.05198).
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Recipe:
    """How to make a tensor again; made once for all that want it, and gone with the last of them."""

    __slots__ = ("make", "made")

    def __init__(self, make: Callable[[], Tensor]):
        self.make, self.made = make, None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        return self.made


def again(y: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """y, marked as what make() gives. make must not hold y."""
    if y.requires_grad:
        y.recipe = Recipe(make)
    return y


def lean() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which marked tensors are not saved for backward."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: getattr(tensor, "recipe", tensor),
        lambda saved: saved() if isinstance(saved, Recipe) else saved,
    )
