"""Activations by the names that config.json files use.

erf:   x * (1 + erf(x / sqrt(2))) / 2                                       (Hendrycks & Gimpel, arXiv 1606.08415)
tanh:  x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2                its approximation, GPT-2's own
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .rematerialise import rematerialisable


class Gelu(torch.autograd.Function):
    """The native kernel. Saves x, from which backward computes the slope."""

    @staticmethod
    def forward(ctx, x: Tensor, tanh: bool, lib) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        ctx.lib = lib
        return run(x, tanh, lib)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x)
        ctx.lib.gelu_backward(x=x, dy=dy, dx=dx, n=x.numel(), tanh=ctx.tanh, dtype=native.CODES[x.dtype])
        return dx, None, None


def run(x: Tensor, tanh: bool, lib) -> Tensor:
    """y, by the kernel or, where lib is None, by PyTorch."""
    if lib is None:
        return F.gelu(x, approximate="tanh" if tanh else "none")
    x = x.contiguous()
    y = torch.empty_like(x)
    lib.gelu_forward(x=x, y=y, n=x.numel(), tanh=tanh, dtype=native.CODES[x.dtype])
    return y


def gelu(x: Tensor, tanh: bool, lib) -> Tensor:
    """y, which backward recomputes where it is needed there."""
    y = run(x, tanh, None) if lib is None else Gelu.apply(x, tanh, lib)
    return rematerialisable(y, partial(run, x.detach(), tanh, lib))


def gelu_erf(x: Tensor) -> Tensor:
    """The exact GELU."""
    return gelu(x, False, native.kernel("gelu", x))


def gelu_tanh(x: Tensor) -> Tensor:
    """The GELU with tanh instead of erf; differs from the exact one by up to 4.7e-4."""
    return gelu(x, True, native.kernel("gelu", x))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), gelu_erf),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), gelu_tanh),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    **dict.fromkeys(("silu", "swish"), F.silu),
    "tanh": torch.tanh,
}
