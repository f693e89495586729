"""Sums of floats that keep to one order, so that a step has the same bits however it is split.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum over rows of dy

With an int8 base the large products are exact (int8.py), but a last bit that differs in what is rounded to int8 becomes
another code, and after a few steps the third digit of the loss. So what is left has to be exact too, or in one order:

- y and dx: each row as if it were alone. A library's product may take another way for few rows than for many; those
  beside it run in kernels/cpu/lora.cpp: LoRA's own, and a layer of floats, as a classifier's head has, here.
- dW and db: the sum over each example's rows by itself, then one example after the other, onto the gradient that the
  micro-batches before have left. The examples follow in one order too: data.batch.cut.

Not so: the product with a language model's vocabulary, which is a library's, and sums over several processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .lora import earlier, settled, shrink, spread


@contextmanager
def sums_in_order(batch) -> Iterator[None]:
    """Sums keep to one order inside, forward and backward of this batch (data/batch.py's); None: they need not.

    What is multiplied has a row for each token or for each row asked about; how many there are tells which.
    """
    if batch is not None:
        tokens = asked = batch.offsets
        if not batch.rows.is_meta:
            asked = torch.searchsorted(batch.rows, batch.offsets)
        native.in_order = {len(batch.rows): asked, len(batch.ids): tokens}
    try:
        yield
    finally:
        native.in_order = {}


@dataclass(frozen=True)
class ByMatrix:
    """The products with a matrix W (out, in), with the members of linear.ByMatrix."""

    matrix: Callable[[torch.dtype], Tensor]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b, (N, out), in x's dtype and without gradients. x (N, in), bias (out,) or None."""
        y = shrink(x, self.matrix(x.dtype), None)
        if bias is not None:
            y += bias
        return y

    def times_transposed(self, dy: Tensor) -> Tensor:
        """dy W, (N, in), in dy's dtype and without gradients. dy (N, out)."""
        w = self.matrix(dy.dtype)
        dx = dy.new_zeros(len(dy), w.shape[1])
        spread(None, dy, w, dx, None)
        return dx


class Linear(torch.autograd.Function):
    """Saves x where W learns."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        _, needs_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_w else None)
        ctx.parameters = w, bias  # themselves, for their gradients: what is saved may be a copy
        return ByMatrix(w.to).times(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        w, bias = ctx.parameters
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        dx = dw = db = None
        if needs_x:
            dx = ByMatrix(w.to).times_transposed(dy)
        if needs_w:
            dw = settled(w, spread(x, dy, w, None, None, earlier(w)))
        if needs_bias:
            db = bias_gradient(dy, bias)
        return dx, dw, db


def bias_gradient(dy: Tensor, bias: Tensor) -> Tensor | None:
    """The sum of dy (N, out) over rows, (out,), as autograd takes it: dW of a single channel that is 1 everywhere."""
    onto = earlier(bias)
    if onto is not None:
        onto = onto[:, None]
    total = spread(dy.new_ones(len(dy), 1), dy, bias[:, None], None, None, onto)
    return settled(bias, total.flatten())


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (N, out), in x's dtype. x (N, in), w (out, in), bias (out,) or None."""
    return Linear.apply(x, w, bias)
