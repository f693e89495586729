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
from .again import again
from .dropout import Noise, dropout, threshold

BLOCK = 16  # rows whose parts of dweight and dbias are summed one after the other; then block with block


class AddNorm(torch.autograd.Function):
    """The native kernel. Saves h, mean and 1 / deviation of each row, and dropout's words.

    Not y instead of h: what a small weight multiplied cannot be found again in y. But y from h, where a layer behind
    wants it for its own gradient (again.py).
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, p, words, lib) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        w, b = weight.float().contiguous(), bias.float().contiguous()
        h, y = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = torch.empty(2, x.shape[0], dtype=torch.float32, device=x.device).unbind()
        drop = *map(native.pointer, words), threshold(p), 1 / (1 - p)
        given = x.data_ptr(), residual.data_ptr(), *drop, w.data_ptr(), b.data_ptr(), eps
        lib.norm_forward(*given, *map(native.pointer, (h, y, mean, rstd)), *x.shape, native.CODES[x.dtype])
        ctx.save_for_backward(h, mean, rstd, weight, *words)
        ctx.settings = drop[2:], lib
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        return h, y, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor | None, dy: Tensor | None, *_):
        h, mean, rstd, weight, row, col = ctx.saved_tensors
        (limit, scale), lib = ctx.settings
        dy = torch.zeros_like(h) if dy is None else dy.contiguous()
        dh, w = None if dh is None else dh.contiguous(), weight.float().contiguous()
        dresidual, dx = torch.empty_like(h), None if row is None else torch.empty_like(h)
        trained = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        sums = w.new_zeros(max(1, -(-len(h) // BLOCK)), 2, len(w)) if trained else None
        given = *map(native.pointer, (dh, dy, h, mean, rstd, row, col)), limit, scale, w.data_ptr()
        made = map(native.pointer, (dresidual, dx, sums))
        lib.norm_backward(*given, *made, BLOCK, *h.shape, native.CODES[h.dtype])
        dweight, dbias = map(torch.clone, sums[0]) if trained else (None, None)  # copies: sums are much larger
        return dresidual if dx is None else dx, dresidual, dweight, dbias, None, None, None, None


def normalise(h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, lib) -> Tensor:
    """y from h (N, C) and its statistics (N,), to the bit as norm_forward made it. weight, bias (C,) float32."""
    y = torch.empty_like(h)
    given = map(native.pointer, (h, mean, rstd, weight, bias, y))
    lib.normalise(*given, *h.shape, native.CODES[h.dtype])
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
        return h, again(layer_norm(h, weight, bias, eps), partial(layer_norm, h.detach(), *copies(weight, bias), eps))
    drops = noise.keys is not None and p > 0
    words = (noise.rows(site), noise.cols(site, x.shape[1])) if drops else (None, None)
    h, y, mean, rstd = AddNorm.apply(x, residual, weight, bias, eps, p, words, lib)
    return h, again(y, partial(normalise, h.detach(), mean, rstd, *copies(weight, bias), lib))


def copies(*tensors: Tensor) -> list[Tensor]:
    """Copies in float32: a weight that is sharded over processes is not at hand when another layer's backward runs."""
    return [t.detach().to(torch.float32, copy=True) for t in tensors]
