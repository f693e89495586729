"""A frozen linear layer with a low-rank update beside it (Hu et al., LoRA, https://arxiv.org/abs/2106.09685).

    h = drop(x) A^T             y = x W^T + b + s h B^T
    g = s dy B                  dA = g^T drop(x)       dB = s dy^T h       dx = dy W + drop'(g A)

Every product goes through rank R, so no matrix of W's size is made. W is whatever `matrix` gives; it does not learn.
N tokens, R rank; A (R, in), B (out, R), x (N, in), y (N, out).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Noise, reference


class LoRA(torch.autograd.Function):
    """Saves x and h (R numbers a token); x only where A learns. Nothing of width `out`, no mask."""

    @staticmethod
    def forward(ctx, x, bias, A, B, matrix, scale, p, words) -> Tensor:
        a, b = A.to(x.dtype), B.to(x.dtype)
        h = (reference(x, *words, p) if words else x) @ a.t()  # (N, R)
        y = F.linear(x, matrix(x.dtype), None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, A, B)
        ctx.settings = matrix, scale, p, words
        return y.addmm_(h, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, h, A, B = ctx.saved_tensors
        matrix, scale, p, words = ctx.settings
        dx = dA = dB = None
        g = (dy @ B.to(dy.dtype)) * scale  # (N, R)
        if ctx.needs_input_grad[2]:
            dA = (g.t() @ (reference(x, *words, p) if words else x)).to(A.dtype)
        if ctx.needs_input_grad[3]:
            dB = (dy.t() @ h).to(B.dtype) * scale
        if ctx.needs_input_grad[0]:
            dx = dy @ matrix(dy.dtype)
            if words:
                dx += reference(g @ A.to(dy.dtype), *words, p)
            else:
                dx.addmm_(g, A.to(dy.dtype))
        return dx, dy.float().sum(0) if ctx.needs_input_grad[1] else None, dA, dB, None, None, None, None


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
