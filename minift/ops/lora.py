"""A frozen linear layer with a low-rank update beside it (Hu et al., LoRA, https://arxiv.org/abs/2106.09685).

    h = drop(x) A^T             y = x W^T + b + s h B^T
    g = s dy B                  dA = g^T drop(x)       dB = s dy^T h       dx = dy W + drop'(g A)

Every product goes through rank R, so no matrix of W's size is made. W is whatever `matrix` gives; it does not learn.
Those with dropout and a small rank run in kernels/cpu/lora.cpp and kernels/cuda/lora.cu: drop(x) is never there whole.

N tokens, R rank; A (R, in), B (out, R), x (N, in), y (N, out).
"""

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dropout import Noise, drop, threshold
from .linear import product

MOST = 16  # ranks that the kernel takes; beyond, and without dropout, torch.mm is as fast
STRIP = 64  # columns that it works on at once
BLOCK = 64  # rows whose part of dA is summed by itself on CUDA; the CPU goes through all rows in order


class LoRA(torch.autograd.Function):
    """Saves x and h (R numbers a token); x only where A learns. Nothing of width `out`, no mask."""

    @staticmethod
    def forward(ctx, x, bias, A, B, matrix, scale, p, words) -> Tensor:
        h = shrink(x, A, p, words)  # (N, R)
        y = product(x, matrix(x.dtype), None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, A, B)
        ctx.settings = matrix, scale, p, words
        return y.addmm_(h, B.to(x.dtype).t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, h, A, B = ctx.saved_tensors
        matrix, scale, p, words = ctx.settings
        g = (dy @ B.to(dy.dtype)) * scale  # (N, R)
        dx = product(dy, matrix(dy.dtype).t()) if ctx.needs_input_grad[0] else None
        dA = spread(x, g, A, dx, p, words)
        dB = (dy.t() @ h).to(B.dtype) * scale if ctx.needs_input_grad[3] else None
        return dx, dy.float().sum(0) if ctx.needs_input_grad[1] else None, dA, dB, None, None, None, None


def shrink(x: Tensor, A: Tensor, p: float, words: tuple[Tensor, Tensor] | None) -> Tensor:
    """drop(x) A^T, (N, R). words: of dropout, for rows and channels, or None without it."""
    lib = native.kernel("lora", x) if words and len(x) and len(A) <= MOST else None
    if lib is None:
        return (drop(x, *words, p) if words else x) @ A.to(x.dtype).t()
    x, a = x.contiguous(), padded(A)
    h = x.new_empty(len(x), len(A))
    lib.lora_forward(*map(native.pointer, (x, a, h)), *settings(words, p), *sizes(x, A, a))
    return h


def spread(
    x: Tensor | None, g: Tensor, A: Tensor, dx: Tensor | None, p: float, words: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """Adds drop'(g A) to dx (N, in), where there is one; returns g^T drop(x), where there is an x."""
    lib = native.kernel("lora", g, x, dx) if words and len(g) and len(A) <= MOST else None
    if lib is None:
        if dx is not None and words:
            dx += drop(g @ A.to(g.dtype), *words, p)
        elif dx is not None:
            dx.addmm_(g, A.to(g.dtype))
        return None if x is None else (g.t() @ (drop(x, *words, p) if words else x)).to(A.dtype)
    x, a, wide = None if x is None else x.contiguous(), padded(A), g.float().contiguous()
    block = len(g) if isinstance(lib, ctypes.CDLL) else BLOCK
    sums = None if x is None else a.new_empty(-(-len(g) // block), len(A), a.shape[1])
    if dx is not None or x is not None:
        given = map(native.pointer, (x, wide, a, sums, dx))
        lib.lora_backward(*given, *settings(words, p), block, *sizes(dx if x is None else x, A, a))
    return None if sums is None else sums[0, :, : A.shape[1]].to(A.dtype, copy=True)  # sums may be much larger


def padded(A: Tensor) -> Tensor:
    """A in float32 with zeros below and beside, up to the kernel's blocks; itself where it fits."""
    a, more = A.detach().float(), (0, -A.shape[1] % STRIP, 0, len(A) % 2)
    return (F.pad(a, more) if any(more) else a).contiguous()


def settings(words: tuple[Tensor, Tensor], p: float) -> tuple:
    """Dropout, as the kernel wants it."""
    return *map(native.pointer, words), threshold(p), 1 / (1 - p)


def sizes(x: Tensor, A: Tensor, a: Tensor) -> tuple:
    """N, C, R, the padded width of A, and the dtype's code."""
    return *x.shape, len(A), a.shape[1], native.CODES[x.dtype]


def lora_linear(
    x: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    matrix: Callable[[torch.dtype], Tensor],
    scale: float,
    p: float,
    noise: Noise,
    site: int,
) -> Tensor:
    """y (N, out) of the equations above, in x's dtype.

    matrix(dtype) is W (out, in) in that dtype, asked for once forward and once backward; p the rate of dropout on x,
    for the update alone; `site` numbers the dropout place in the model.
    """
    words = (noise.rows(site), noise.cols(site, x.shape[1])) if p > 0 and noise.keys is not None else None
    return LoRA.apply(x, bias, A, B, matrix, scale, p, words)
