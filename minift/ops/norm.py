"""Dropout, residual and layer norm, the three passes between two matrix products.

    h = residual + drop(x)        y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

(Ba et al., https://arxiv.org/abs/1607.06450.) BERT goes on with y alone, GPT-2 with both. The gradients stand in
kernels/cpu/norm.cpp. N tokens, C width.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dropout import Drop, Noise, dropout, for_kernels
from .rematerialise import rematerialisable

BLOCK = 16  # rows whose parts of dweight and dbias are summed one after the other; then block with block


class AddNorm(torch.autograd.Function):
    """The native kernel. Saves h, the mean and 1 / deviation of each row, and dropout's words.

    h is saved, not y: y cannot be inverted where a weight is near 0. Where a layer behind needs y for its own gradient,
    y is recomputed from h (rematerialise.py).
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, drop: Drop | None, lib) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.contiguous()
        residual = residual.contiguous()
        w = weight.float().contiguous()
        b = bias.float().contiguous()
        N, C = x.shape
        h = torch.empty_like(x)
        y = torch.empty_like(x)
        mean, rstd = torch.empty(2, N, dtype=torch.float32, device=x.device).unbind()
        inputs = dict(x=x, residual=residual, drop=for_kernels(drop), weight=w, bias=b, eps=eps)
        lib.norm_forward(**inputs, h=h, y=y, mean=mean, rstd=rstd, N=N, C=C, dtype=native.CODES[x.dtype])

        row = col = None
        if drop is not None:
            row, col, ctx.p = drop
        ctx.save_for_backward(h, mean, rstd, weight, row, col)
        ctx.lib = lib
        # BERT uses y alone: the gradient of h is then None, and no tensor of zeros
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        return h, y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor | None, dy: Tensor | None, *_):
        h, mean, rstd, weight, row, col = ctx.saved_tensors
        w = weight.float().contiguous()
        N, C = h.shape
        if dh is not None:
            dh = dh.contiguous()
        dy = torch.zeros_like(h) if dy is None else dy.contiguous()
        inputs = dict(dh=dh, dy=dy, h=h, mean=mean, rstd=rstd, weight=w)

        # without dropout the gradients of x and of the residual are one tensor
        dresidual = torch.empty_like(h)
        dx = drop = None
        if row is not None:
            dx = torch.empty_like(h)
            drop = Drop(row, col, ctx.p)

        # frozen weights have no gradients: no sums for them
        sums = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            sums = w.new_zeros(max(1, -(-N // BLOCK)), 2, C)
        outputs = dict(dresidual=dresidual, dx=dx, sums=sums, block=BLOCK)
        ctx.lib.norm_backward(**inputs, **outputs, drop=for_kernels(drop), N=N, C=C, dtype=native.CODES[h.dtype])

        dweight = dbias = None
        if sums is not None:
            dweight, dbias = sums[0, 0].clone(), sums[0, 1].clone()  # copies: sums are much larger
        return dresidual if dx is None else dx, dresidual, dweight, dbias, None, None, None


def normalise(h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, lib) -> Tensor:
    """y from h (N, C) and its statistics (N,), to the bit as norm_forward made it. weight, bias (C,) float32."""
    y = torch.empty_like(h)
    N, C = h.shape
    lib.normalise(h=h, mean=mean, rstd=rstd, weight=weight, bias=bias, y=y, N=N, C=C, dtype=native.CODES[h.dtype])
    return y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (N, C) normalised over its channels, in x's dtype with statistics in float32."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, noise: Noise, site: int
) -> tuple[Tensor, Tensor]:
    """(h, y) of the equations above, both (N, C). x and residual (N, C), weight and bias (C,)."""
    lib = native.kernel("norm", x, residual)
    if lib is None:
        h = residual + dropout(x, p, noise, site)
        y = layer_norm(h, weight, bias, eps)
        make = partial(layer_norm, h.detach(), float_copy(weight), float_copy(bias), eps)
    else:
        drop = noise.drop(p, site, x.shape[1])
        h, y, mean, rstd = AddNorm.apply(x, residual, weight, bias, eps, drop, lib)
        make = partial(normalise, h.detach(), mean, rstd, float_copy(weight), float_copy(bias), lib)
    return h, rematerialisable(y, make)


def float_copy(t: Tensor) -> Tensor:
    """A copy in float32: a weight that is sharded over processes is not at hand when another layer's backward runs."""
    return t.detach().to(torch.float32, copy=True)
