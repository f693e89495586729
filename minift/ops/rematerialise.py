"""Outputs that the backward pass recomputes, by one elementwise pass, where autograd would save them.

    y = rematerialisable(gelu(x), make)     make() gives y once more, from tensors that are kept anyway
    with rematerialise():                   whatever saves y for backward in here, such as a linear layer that needs it
        loss = ...                          for the gradient of its weight, keeps make instead of y

A layer of width C keeps 10 C numbers a token instead of 16 C where all weights are trained: neither the activation's
output (4 C) nor those of two norms. The same kernel makes the same bits, in about 1 % of a step's time (the cheap end
of what Korthikanti et al. recompute, https://arxiv.org/abs/2205.05198).

How it works: y carries its recipe as an attribute, `y.recipe`. When an operator inside the context saves a tensor,
autograd calls the first of two hooks with it, and keeps what the hook returns: the recipe, if the tensor has one. In
backward the second hook turns the recipe into y. So neither a model nor a linear layer has to know of any of this. A
view or a copy of y has no recipe and is saved as usual.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Recipe:
    """How to make a tensor again. It is made once for all who want it, and gone with the last of them."""

    __slots__ = ("make", "made")

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        return self.made


def rematerialisable(y: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """y, marked as what make() gives. make must not hold y, or nothing is saved."""
    if y.requires_grad:
        y.recipe = Recipe(make)
    return y


def rematerialise() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which a marked tensor is not saved for backward, only its recipe."""
    return torch.autograd.graph.saved_tensors_hooks(keep_recipe, follow_recipe)


def keep_recipe(tensor: Tensor) -> Tensor | Recipe:
    """What autograd keeps of a tensor."""
    return getattr(tensor, "recipe", tensor)


def follow_recipe(kept: Tensor | Recipe) -> Tensor:
    """The tensor that backward gets."""
    return kept() if isinstance(kept, Recipe) else kept
