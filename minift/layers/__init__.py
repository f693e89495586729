"""The parameters of a network and what they compute: Linear, Embedding, LayerNorm.

A linear layer is whatever has in_features, out_features, bias, matrix(dtype), products() and forward(x, noise): Linear
here, and those whose weights are packed into few bits (packed.py). An adapter wraps one of them, and is one itself, but
for products().

All of mixed precision is that weights are cast to the dtype of the activations where they are used.
Weights are created uninitialised: checkpoints/weights.py streams a checkpoint in, or draws them. N tokens, C width.
"""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..ops import embedding, in_order, native, norm
from ..ops.dropout import SILENT, Noise
from ..ops.linear import ByMatrix, linear


def recomputed(f: Callable, *args):
    """f(*args), of which nothing inside is saved for backward: it is computed again there (https://arxiv.org/abs/1604.06174).

    Exact, dropout too: noise is an argument and no generator's state. Without gradients nothing would be saved anyway.
    """
    again = Again(f, args)
    with saved_tensors_hooks(again.number, again.tensor):
        return f(*args)


class AllThere(Exception):
    """What was to be saved is there: the rest need not be computed."""


class Again:
    """A computation whose saved tensors are numbers until backward asks for the first of them.

    This is what torch.utils.checkpoint does, which also imports torch's compiler: 80 MB and a second.
    """

    def __init__(self, f: Callable, args: tuple):
        self.f = f
        self.args = args
        self.count = 0  # of tensors that forward saved
        self.made: dict[int, Tensor] = {}

    def number(self, tensor: Tensor) -> int:
        """What autograd keeps of a tensor that it saves."""
        self.count += 1
        return self.count - 1

    def tensor(self, number: int) -> Tensor:
        """What backward gets, once each."""
        if number not in self.made:
            self.compute()
        return self.made.pop(number)

    def compute(self) -> None:
        """The same computation, whose saved tensors are kept in the same order."""
        self.made = {}

        def keep(tensor: Tensor) -> None:
            self.made[len(self.made)] = tensor.detach()
            if len(self.made) == self.count:
                raise AllThere

        args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in self.args]
        # the second hook is for a backward pass, which this computation does not have
        with suppress(AllThere), torch.enable_grad(), saved_tensors_hooks(keep, lambda _: None):
            self.f(*args)


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out_features, in_features) in `dtype`."""
        return self.weight.to(dtype)

    def products(self) -> ByMatrix | in_order.ByMatrix:
        """The products with W where it does not learn, without gradients."""
        if native.in_order:
            return in_order.ByMatrix(self.matrix)
        return ByMatrix(self.matrix)

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        if native.in_order:
            return in_order.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> Linear:
    """A Linear of a copy of this weight (out, in), and this bias in float32."""
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().float())
    return layer


class Embedding(nn.Module):
    """A row of the table for each id."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (N,) -> (N, C)."""
        return embedding.rows(ids, self.weight)


class LayerNorm(nn.Module):
    """The weights of a layer norm; `ops.norm` computes it, alone or with what comes before."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) -> (N, C)."""
        return norm.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor, p: float, noise: Noise, site: int) -> tuple[Tensor, Tensor]:
        """(h, y): h = residual + drop(x), y = the norm of h."""
        return norm.add_norm(x, residual, self.weight, self.bias, self.eps, p, noise, site)
