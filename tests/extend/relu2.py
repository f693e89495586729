"""Squared ReLU, the activation of Primer (So et al., https://arxiv.org/abs/2109.08668): "relu2" in config.json.

    r = max(x, 0)        y = r^2        dx = 2 r dy

x and y have any one shape and dtype. PyTorch makes this in two passes and saves r and x; here it is one pass that saves
x alone, and y is made again in backward where it is needed there. The kernel is kernels/cpu/relu2.cpp; it and the
reference give the same bits, since each result is rounded once (2 r is exact).

This file is a fork's: it stands in minift/ops/, relu2.cpp in kernels/cpu/, and ops/gelu.py imports `relu2` and has the
line `"relu2": relu2` in ACTIVATIONS. What a kernel has to keep to: kernels/README.md.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .rematerialise import rematerialisable


class Relu2(torch.autograd.Function):
    """Saves x. lib: the kernel, or None for the reference."""

    @staticmethod
    def forward(ctx, x: Tensor, lib) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.lib = lib
        return run(x, lib)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        if ctx.lib is None:
            return dy * (2 * F.relu(x)), None
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        ctx.lib.relu2_backward(x=x, dy=dy, dx=dx, n=x.numel(), dtype=native.CODES[x.dtype])
        return dx, None


def run(x: Tensor, lib) -> Tensor:
    """y, by the kernel or, where lib is None, by PyTorch."""
    if lib is None:
        return F.relu(x).square()
    x = x.contiguous()
    y = torch.empty_like(x)
    lib.relu2_forward(x=x, y=y, n=x.numel(), dtype=native.CODES[x.dtype])
    return y


def relu2(x: Tensor) -> Tensor:
    """y, which backward recomputes where it is needed there."""
    lib = native.kernel("relu2", x)
    return rematerialisable(Relu2.apply(x, lib), partial(run, x.detach(), lib))
