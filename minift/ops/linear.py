"""A linear layer's products, by the library that is faster on this CPU.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum over rows of dy

torch.mm is MKL's, which on AMD's CPUs leaves 5 to 20 % of y and dx to oneDNN, the other library inside torch's wheels
(benchmarks/LOG.md, 2026-11-25); dW is MKL's, about as fast. Anywhere else, in other dtypes and with --kernels reference
all are torch's own. N tokens.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native

LEAST = 1 << 16  # weights of a matrix that is worth it


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (N, out), without gradients. x (N, in), w (out, in) with any strides, bias (out,) or None."""
    if takes(x, w):
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


def takes(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN is to multiply these."""
    fits = x.is_cpu and x.dtype == w.dtype == torch.float32 and x.dim() == 2 and len(x) > 0 and w.numel() >= LEAST
    return fits and native.mode != "reference" and is_faster()


@cache
def is_faster() -> bool:
    """Whether this is a CPU on which oneDNN was measured to be faster, and torch has it."""
    native.keep_few_products()
    cpu, there = native.cpu(), torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and "AMD" in cpu and "avx512f" in cpu


class Linear(torch.autograd.Function):
    """Saves x where W learns, and W where x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        return product(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx = product(dy, w.t()) if needs[0] else None
        return dx, dy.t() @ x if needs[1] else None, dy.sum(0) if needs[2] else None


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (N, out). x (N, in), w (out, in), bias (out,) or None."""
    return Linear.apply(x, w, bias) if takes(x, w) else F.linear(x, w, bias)
