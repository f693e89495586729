"""A frozen linear layer with a low-rank update beside it (Hu et al., LoRA, https://arxiv.org/abs/2106.09685).

    h = drop(x) A^T             y = x W^T + b + s h B^T
    g = s dy B                  dA = g^T drop(x)       dB = s dy^T h       dx = dy W + drop'(g A)

Every product goes through rank R, so no matrix of W's size is made. W does not learn, and is whatever
`products` multiplies by. With dropout and a small rank the products with A run in kernels/cpu/lora.cpp and
kernels/cuda/lora.cu, which never make drop(x) as a whole. Where sums keep to one order (in_order.py), all products but
W's run there.

N tokens, R rank; A (R, in), B (out, R), x (N, in), y (N, out).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dropout import Drop, dropped, for_kernels
from .linear import goes_by_floats, matmul

MOST = 16  # ranks that CUDA's kernel takes; beyond, and without dropout, torch.mm is as fast
STRIP = 64  # columns that it works on at once
BLOCK = 64  # rows whose part of dA is summed by itself on CUDA; the CPU goes through all rows in order


class LoRA(torch.autograd.Function):
    """Saves x and h (R numbers a token); x only where A learns. Nothing of width `out`, no mask."""

    @staticmethod
    def forward(ctx, x, bias, A, B, products, scale, drop: Drop | None) -> Tensor:
        h = shrink(x, A, drop)  # (N, R)
        y = products.times(x, bias)

        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, h, A, B)  # so that a change of them is told
        ctx.products = products
        ctx.scale = scale
        ctx.drop = drop
        ctx.learns = A, B  # themselves, for their gradients: what is saved may be a copy
        if native.in_order:
            spread(None, h.float() * scale, B.t(), y, None)
            return y
        if goes_by_floats(y):
            return y.add_(matmul(h, B.to(x.dtype).t()), alpha=scale)
        return y.addmm_(h, B.to(x.dtype).t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, h, *_ = ctx.saved_tensors
        A, B = ctx.learns
        needs_x, needs_bias, _, needs_B, *_ = ctx.needs_input_grad
        g = shrink(dy, B.t(), None) * ctx.scale  # (N, R)
        dx = dbias = dB = None
        if needs_x:
            dx = ctx.products.times_transposed(dy)
        dA = spread(x, g, A, dx, ctx.drop, earlier(A))  # and the update's part of dx
        if needs_B:
            dB = gradient_of_B(dy, h, B, ctx.scale)
        if needs_bias:
            dbias = dy.float().sum(0)
        return dx, dbias, settled(A, dA), settled(B, dB), None, None, None


def shrink(x: Tensor, A: Tensor, drop: Drop | None) -> Tensor:
    """drop(x) A^T, (N, R)."""
    lib = kernel(A, drop, x)
    if lib is None:
        if drop is not None:
            x = dropped(x, drop)
        return matmul(x, A.to(x.dtype).t())

    x = x.contiguous()
    a = padded(A)
    (N, C), R = x.shape, len(A)
    h = x.new_empty(N, R)
    sizes = dict(N=N, C=C, R=R, lda=a.shape[1], dtype=native.CODES[x.dtype])
    lib.lora_forward(x=x, A=a, h=h, drop=for_kernels(drop), **sizes)
    return h


def spread(
    x: Tensor | None, g: Tensor, A: Tensor, dx: Tensor | None, drop: Drop | None, onto: Tensor | None = None
) -> Tensor | None:
    """Adds drop'(g A) to dx (N, in), where there is one; returns g^T drop(x), (R, in), where there is an x.

    onto (R, in): what it is added to, an example after the other, where sums keep to one order.
    """
    wide = [t for t in (x, dx) if t is not None]
    if not wide:
        return None
    lib = kernel(A, drop, *wide)
    if lib is None:
        dA = reference_spread(x, g.to(wide[0].dtype), A, dx, drop)
        return dA if onto is None else dA + onto

    if x is not None:
        x = x.contiguous()
    g_float = g.float().contiguous()
    a = padded(A)
    N, C, R, lda = len(g), A.shape[1], len(A), a.shape[1]
    sums = offsets = None
    if lib.on_cuda:
        if x is not None:
            sums = a.new_empty(-(-N // BLOCK), R, lda)
    elif x is not None:
        sums = a.new_zeros(1, R, lda) if onto is None else padded(onto)[None]
        offsets = native.in_order.get(N)
    sizes = dict(block=BLOCK, N=N, C=C, R=R, lda=lda, dtype=native.CODES[wide[0].dtype])
    groups = dict(offsets=offsets, examples=0 if offsets is None else len(offsets) - 1)
    lib.lora_backward(x=x, g=g_float, A=a, sums=sums, dx=dx, drop=for_kernels(drop), **groups, **sizes)
    if sums is None:
        return None
    return sums[0, :R, :C].to(A.dtype, copy=True)  # a copy: sums may be much larger


def gradient_of_B(dy: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """s dy^T h, (out, R)."""
    if not native.in_order:
        return matmul(dy.t(), h).to(B.dtype) * scale
    onto = earlier(B)
    if onto is not None:
        onto = onto.t()
    return spread(dy, h.float() * scale, B.t(), None, None, onto).t()


def reference_spread(x: Tensor | None, g: Tensor, A: Tensor, dx: Tensor | None, drop: Drop | None) -> Tensor | None:
    """The same with PyTorch."""
    if dx is not None and drop is not None:
        dx += dropped(matmul(g, A.to(g.dtype)), drop)
    elif dx is not None and goes_by_floats(dx):
        dx += matmul(g, A.to(g.dtype))
    elif dx is not None:
        dx.addmm_(g, A.to(g.dtype))
    if x is None:
        return None
    if drop is not None:
        x = dropped(x, drop)
    return matmul(g.t(), x).to(A.dtype)


def kernel(A: Tensor, drop: Drop | None, *tensors: Tensor | None):
    """The kernel, if it is for these: with dropout, without which torch.mm is as fast, some rows and a small rank.

    Where sums keep to one order, any that has rows.
    """
    is_worth_it = drop is not None and len(A) <= MOST
    if len(tensors[0]) == 0 or not (is_worth_it or native.in_order):
        return None
    return native.kernel("lora", *tensors)


def earlier(parameter: Tensor) -> Tensor | None:
    """The gradient that micro-batches before have left, where sums keep to one order: they are gone on from."""
    if not native.in_order or not parameter.is_leaf:
        return None
    return parameter.grad


def settled(parameter: Tensor, total: Tensor | None) -> Tensor | None:
    """What autograd is to add to a gradient: `total`, or nothing where that has gone on from the gradient itself."""
    if total is None or earlier(parameter) is None:
        return total
    parameter.grad.copy_(total)
    return None


def padded(A: Tensor) -> Tensor:
    """A in float32 with zeros below and beside, up to the kernel's blocks; itself where it fits."""
    a = A.detach().float()
    columns = -A.shape[1] % STRIP
    rows = len(A) % 2
    if columns or rows:
        a = F.pad(a, (0, columns, 0, rows))
    return a.contiguous()


def lora_linear(
    x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, products, scale: float, drop: Drop | None
) -> Tensor:
    """y (N, out) of the equations above, in x's dtype.

    products: with W, as ByMatrix in linear.py has them; drop is what dropout does to x, for the update alone.
    """
    return LoRA.apply(x, bias, A, B, products, scale, drop)
