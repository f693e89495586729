"""A linear layer's products, by the library that is faster on this CPU.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum over rows of dy

torch.mm is MKL's, which leaves 5 to 20 % of y and dx on AMD's Zen 4, and half of everything on Zen 5, to oneDNN, the
other library inside torch's wheels (benchmarks/LOG.md, 2026-11-25). In bfloat16, on a CPU that has no products of
them, both take five times as long as in float32; there the numbers are made float32 a part at a time, and the sums are
rounded once, as the instructions do it. Anywhere else and with --kernels reference all are torch's own. N tokens.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .compile import cpu

LEAST = 1 << 16  # weights of a matrix that is worth it
TOKENS, OUT = 704, 3072  # of dy in a piece of dW's product: it is turned round first, which has to stay in the cache
AS_FLOATS = 1 << 20  # weights of a bfloat16 matrix that are float32 at once, about
EVEN = 64  # rows of them are a multiple of this: an odd number of them costs a seventh of the rate


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (N, out), without gradients. x (N, in), w (out, in) with any strides, bias (out,) or None."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if takes(x, w, w.numel()) and (w.is_contiguous() or is_faster_turned()):
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    if goes_by_floats(x):
        return product_by_floats(x, w, bias)
    return F.linear(x, w, bias)


def weight_gradient(dy: Tensor, x: Tensor, onto: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """dy^T x, (out, in), without gradients; added to `onto` in place, if there is one. dy (N, out), x (N, in).

    dtype: of the result, and of `onto`, where it is another than that of dy and x.
    """
    wider = dtype is not None and dtype != x.dtype
    if dtype == torch.float32 and goes_by_floats(x):
        return weight_gradient_by_floats(dy, x, onto)
    if wider and x.is_cuda:  # the sums are float32 on the way there, and are not rounded
        if onto is None:
            return torch.mm(dy.t(), x, out_dtype=dtype)
        return torch.addmm(onto, dy.t(), x, out_dtype=dtype, out=onto)
    if wider:
        part = (dy.t() @ x).to(dtype)
        if onto is None:
            return part
        return onto.add_(part)

    out = dy.shape[1]
    if not (takes(x, dy, out * x.shape[1]) and is_faster_for_weights()):
        if onto is None:
            return dy.t() @ x
        return onto.addmm_(dy.t(), x)

    if onto is None and out <= OUT:
        return piece(dy, x)
    if onto is None:
        onto = x.new_zeros(out, x.shape[1])
    for i in range(0, out, OUT):
        onto[i : i + OUT] += piece(dy[:, i : i + OUT], x)
    return onto


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in a's dtype, without gradients: for narrow matrices, which nobody multiplies faster than torch."""
    if goes_by_floats(a):
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def piece(dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x by oneDNN, a piece of the rows after the other."""
    multiply = torch.ops.mkldnn._linear_pointwise  # which not every torch has
    total = None
    for a, b in zip(dy.split(TOKENS), x.split(TOKENS), strict=True):
        if total is None:
            total = multiply(a.t(), b.t(), None, "none", [], "")
        else:
            total = multiply.binary(a.t(), total, b.t(), None, "add")
    return total


def takes(x: Tensor, y: Tensor, weights: int) -> bool:
    """Whether oneDNN is to multiply these, in a layer of that many weights."""
    fits = x.is_cpu and x.dtype == y.dtype == torch.float32 and x.dim() == 2 and len(x) > 0 and weights >= LEAST
    return fits and native.mode != "reference" and is_faster()


@cache
def is_faster() -> bool:
    """Whether this is a CPU on which oneDNN was measured to be faster, and torch has it."""
    keep_few_products()
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and "AMD" in cpu() and "avx2" in cpu()


@cache
def is_faster_turned() -> bool:
    """The same with a matrix that does not lie by rows, as W in dy W: not without AVX-512."""
    return is_faster() and "avx512f" in cpu()


@cache
def is_faster_for_weights() -> bool:
    """The same for dW, where oneDNN has to win more: Zen 5, the first of AMD's with these instructions."""
    return is_faster() and "avx_vnni" in cpu()


# ---- bfloat16 on a CPU without instructions for it


def goes_by_floats(x: Tensor) -> bool:
    """Whether products with x are made in float32 and rounded."""
    if x.dtype != torch.bfloat16 or native.mode == "reference" or cpu_bfloat16():
        return False
    if x.is_meta:  # a plan's, which is for the GPU where there is one
        return not torch.cuda.is_available()
    return x.is_cpu


def cpu_bfloat16() -> str:
    """What multiplies bfloat16 matrices in this CPU, or "" where nothing does."""
    # not torch.ops.mkldnn._is_mkldnn_bf16_supported: it says yes where oneDNN makes do without
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512-BF16"
    return ""


def product_by_floats(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (N, out), of bfloat16 numbers, the float32 sums rounded once."""
    if not w.is_contiguous():  # W lies by columns, as in dy W: some of them at a time add to all sums
        sums = x.new_zeros(len(x), len(w), dtype=torch.float32)
        columns = at_once(w.shape[1], len(w))
        for x_part, w_part in zip(x.split(columns, 1), w.split(columns, 1), strict=True):
            sums.addmm_(x_part.float(), w_part.float().t())
        if bias is not None:
            sums += bias
        return sums.to(x.dtype)

    floats = x.float()
    y = x.new_empty(len(x), len(w))
    rows = at_once(*w.shape)
    for i in range(0, len(w), rows):
        b = None
        if bias is not None:
            b = bias[i : i + rows].float()
        y[:, i : i + rows] = product(floats, w[i : i + rows].float(), b)
    return y


def weight_gradient_by_floats(dy: Tensor, x: Tensor, onto: Tensor | None) -> Tensor:
    """dy^T x, (out, in), of bfloat16 numbers in float32, which is not rounded; added to `onto`, if there is one."""
    if onto is None:
        onto = x.new_zeros(dy.shape[1], x.shape[1], dtype=torch.float32)
    floats = x.float()
    rows = at_once(len(onto), len(x))
    for i in range(0, len(onto), rows):
        onto[i : i + rows].addmm_(dy[:, i : i + rows].float().t(), floats)
    return onto


def at_once(rows: int, width: int) -> int:
    """Rows of a bfloat16 matrix (rows, width) that are float32 at once: in parts of one size, of about AS_FLOATS."""
    parts = max(1, round(rows * width / AS_FLOATS))
    return EVEN * max(1, math.ceil(rows / parts / EVEN))


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of dy (N, out) over rows, (out,), in `dtype`."""
    if dy.is_cuda:
        return dy.sum(0, dtype=dtype)
    return dy.sum(0).to(dtype)  # as above it would copy all of dy


class Linear(torch.autograd.Function):
    """Saves x where W learns, and W, in x's dtype, where x has a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_w, _ = ctx.needs_input_grad
        ctx.dtype = w.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        w = w.to(x.dtype)
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        return product(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad
        dx = dw = dbias = None
        if needs_x:
            dx = product(dy, w.t())
        if needs_w:
            dw = weight_gradient(dy, x, dtype=ctx.dtype)
        if needs_bias:
            dbias = bias_gradient(dy, ctx.bias_dtype)
        return dx, dw, dbias


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (N, out), in x's dtype. x (N, in); w (out, in), bias (out,) or None, of any."""
    if w.dtype != x.dtype or takes(x, w, w.numel()) or goes_by_floats(x):
        return Linear.apply(x, w, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    return F.linear(x, w, bias)


# ---- a matrix that does not learn


@dataclass(frozen=True)
class ByMatrix:
    """The products with a matrix W (out, in) that does not learn, which is made in a dtype where it is needed."""

    matrix: Callable[[torch.dtype], Tensor]

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b, (N, out), in x's dtype and without gradients. x (N, in), bias (out,) or None."""
        return product(x, self.matrix(x.dtype), bias)

    def times_transposed(self, dy: Tensor) -> Tensor:
        """dy W, (N, in), in dy's dtype and without gradients. dy (N, out)."""
        return product(dy, self.matrix(dy.dtype).t())


class Frozen(torch.autograd.Function):
    """y = x W^T + b, where W does not learn: saves nothing, and backward asks for W again."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, products) -> Tensor:
        ctx.products = products
        return products.times(x, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        needs_x, needs_bias, _ = ctx.needs_input_grad
        dx = dbias = None
        if needs_x:
            dx = ctx.products.times_transposed(dy)
        if needs_bias:
            dbias = dy.float().sum(0)
        return dx, dbias, None


def frozen_linear(x: Tensor, bias: Tensor | None, products) -> Tensor:
    """x (N, in) -> (N, out) by a matrix that does not learn. bias (out,) or None; products: as ByMatrix has them."""
    return Frozen.apply(x, bias, products)


def keep_few_products() -> None:
    """Bounds what oneDNN, the products' library in bfloat16, keeps: code for each shape, so for each number of tokens.

    By default the last 1,024 shapes stay in each of two caches, which grow by 5 MB a step up to 1.2 GB. A step needs
    about ten, each many times, and making one takes under a millisecond. Read at oneDNN's first product; a variable
    that is set already holds.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's
        os.environ.setdefault(name, "32")
