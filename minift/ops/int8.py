"""Products with a frozen matrix in int8 (after Dettmers et al., LLM.int8(), https://arxiv.org/abs/2208.07339).

    weights, a row of W at a time         s = max |w|        codes = round(127 w / s)        w ~ codes s / 127
    y = x W^T + b                         a = max |x|        y = (round(127 x / a) codes^T) (a / 127) (s / 127) + b
    dx = dy W                             the same of g = dy s / 127, a row at a time, and codes instead of codes^T

One copy of the codes serves both, since s goes into g beforehand. Sums of products of int8 are exact in int32, so their
order does not matter: threads, micro-batches and instructions (AMX, VNNI, loops) give the same bits. What it takes for
the rest of a step to do so, too: in_order.py.

Elements of x or g more than KEEP times as large as the mean of their row would leave no digits to the others. They are
kept apart, at most MOST of a row: their part of the product is in float32, from the codes, in the order of channels.
Each row is treated by itself, so what else is in the batch changes nothing.

The products are torch._int_mm's, but on a CPU without VNNI, where that takes 25 times as long as float32's or is not
exact: there kernels/cpu/int8.cpp has one, and without a compiler they are float32's, in pieces. On the CPU, float32 and
bfloat16 run that kernel around the products; the reference here is the specification.
N tokens, C channels before a product, O after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import native
from .compile import cpu

KEEP, MOST = 16, 64  # KEEP stands in kernels/cpu/int8.cpp too
ROWS = 4  # of a tile of kernels/cpu/int8.cpp
LEAST = 32  # rows that torch._int_mm takes on CUDA
EXACT = 1024  # products of codes whose sum float32 holds: 1024 * 127 * 127 < 2^24


@dataclass
class Rows:
    """Rows of numbers, (N, C), as int8 and what is kept apart of them."""

    codes: Tensor  # (N, C) int8
    absmax: Tensor  # (N,) float32
    columns: Tensor  # (N, most) int32
    values: Tensor  # (N, most) float32
    counts: Tensor  # (N,) int32: how many of the above are in use


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (O, C) int8, s (O,) float32) of a matrix (O, C)."""
    matrix = matrix.float()
    absmax = matrix.abs().amax(1)
    return (matrix * per_unit(absmax)[:, None]).round().to(torch.int8), absmax


def per_unit(absmax: Tensor) -> Tensor:
    """127 / absmax, rounded once (as `127 / tensor` is not, for torch); 0 for 0."""
    return torch.where(absmax > 0, torch.full_like(absmax, 127) / absmax, 0.0)


def dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """codes s / 127, (O, C), in `dtype`."""
    return torch.mul(codes, (absmax / 127)[:, None]).to(dtype)


@dataclass(frozen=True)
class Products:
    """The products with a matrix W (O, C): its codes (O, C) int8 and absmax (O,) float32."""

    codes: Tensor
    absmax: Tensor

    def times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b, (N, O), in x's dtype and without gradients. x (N, C), bias (O,) or None."""
        rows = quantize_rows(x, None)
        scales = self.absmax / 127
        sums = multiply(rows.codes, self.codes.t())
        return from_sums(sums, rows, scales, bias, x.dtype, lambda k: kept_weights(self.codes, k, scales))

    def times_transposed(self, dy: Tensor) -> Tensor:
        """dy W, (N, C), in dy's dtype and without gradients. dy (N, O)."""
        rows = quantize_rows(dy, self.absmax / 127)
        sums = multiply(rows.codes, self.codes)
        return from_sums(sums, rows, None, None, dy.dtype, lambda k: self.codes[k].float())


def kept_weights(codes: Tensor, channels: Tensor, scales: Tensor) -> Tensor:
    """W^T of some channels, (number of them, O) float32, by rows in memory."""
    return (codes[:, channels].float() * scales[:, None]).t().contiguous()


def multiply(x: Tensor, w: Tensor) -> Tensor:
    """x w, (N, O) int32, exact. x (N, C), w (C, O), int8 without -128."""
    if not x.numel():
        return x.new_zeros((len(x), w.shape[1]), dtype=torch.int32)
    if not x.is_cuda and not has_int_mm():
        return multiply_here(x, w)
    if x.is_cuda and len(x) < LEAST:
        padded = x.new_zeros(LEAST, x.shape[1])
        padded[: len(x)] = x
        return torch._int_mm(padded, w)[: len(x)]
    return torch._int_mm(x, w)


@cache
def has_int_mm() -> bool:
    """Whether the CPU has instructions for torch._int_mm, and they are used: without them it is slow, or not exact."""
    if "avx512_vnni" not in cpu():
        return False
    x = torch.full((64, 512), 127, dtype=torch.int8, device="cpu")
    right = torch.full((64, 64), 512 * 127 * 127, dtype=torch.int32, device="cpu")
    by_rows = torch._int_mm(x, x.t().contiguous())
    by_columns = torch._int_mm(x, x.t())
    return torch.equal(by_rows, right) and torch.equal(by_columns, right)


def multiply_here(x: Tensor, w: Tensor) -> Tensor:
    """The same by the kernel. w (C, O) or its transpose by rows in memory."""
    N, C = x.shape
    sums = x.new_empty((N, w.shape[1]), dtype=torch.int32)
    lib = native.kernel("int8", sums)
    if lib is None:
        return multiply_by_floats(x, w)
    by_outputs = w.stride(0) == 1 and w.t().is_contiguous()
    matrix = w.t() if by_outputs else w.contiguous()
    pairs = x.new_empty((-(-N // ROWS) * ROWS, (C + 1) // 2), dtype=torch.int32)
    lib.multiply(x=x.contiguous(), w=matrix, pairs=pairs, sums=sums, N=N, C=C, O=w.shape[1], by_outputs=by_outputs)
    return sums


def multiply_by_floats(x: Tensor, w: Tensor) -> Tensor:
    """The same sums from products of float32, exact below 2^24: of so many channels at a time."""
    total = x.new_zeros((len(x), w.shape[1]), dtype=torch.int32)
    for i in range(0, x.shape[1], EXACT):
        total += (x[:, i : i + EXACT].float() @ w[i : i + EXACT].float()).int()
    return total


def quantize_rows(x: Tensor, factors: Tensor | None) -> Rows:
    """The rows of x (N, C) in int8, multiplied by factors (C,) first, if there are any."""
    x = x.contiguous()
    N, C = x.shape
    most = min(MOST, C // KEEP)
    lib = native.kernel("int8", x)
    if lib is None:
        return reference_rows(x, factors, most)
    rows = Rows(
        codes=x.new_empty((N, C), dtype=torch.int8),
        absmax=x.new_empty(N, dtype=torch.float32),
        columns=x.new_empty((N, most), dtype=torch.int32),
        values=x.new_empty((N, most), dtype=torch.float32),
        counts=x.new_empty(N, dtype=torch.int32),
    )
    sizes = dict(N=N, C=C, most=most, dtype=native.CODES[x.dtype])
    lib.quantize_rows(x=x, factors=factors, **vars(rows), **sizes)
    return rows


def reference_rows(x: Tensor, factors: Tensor | None, most: int) -> Rows:
    """The same with PyTorch."""
    x = x.float()
    if factors is not None:
        x = x * factors
    size = x.abs()
    is_kept = size > KEEP * size.mean(1, keepdim=True)
    is_kept &= is_kept.cumsum(1) <= most
    counts = is_kept.sum(1, dtype=torch.int32)
    rest = x.masked_fill(is_kept, 0)
    absmax = rest.abs().amax(1) if x.shape[1] else rest.sum(1)
    codes = (rest * per_unit(absmax)[:, None]).round().nan_to_num(0, 0, 0).to(torch.int8)

    # those that are kept come first in each row, and keep their order
    columns = (~is_kept).int().argsort(dim=1, stable=True)[:, :most]
    values = x.gather(1, columns)
    finite = size.sum(1)
    return Rows(codes, absmax + (finite - finite), columns.int(), values, counts)


def from_sums(
    sums: Tensor,
    rows: Rows,
    scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    weights: Callable[[Tensor], Tensor],
) -> Tensor:
    """sums (N, O) int32, which are given up, as numbers in `dtype`, with what was kept apart and the bias.

    scales (O,), or None: all 1. weights(channels): the float32 weights of these channels, (number of them, O).
    """
    if bias is not None:
        bias = bias.float()
    channels = places = taken = counts = None
    if not sums.is_meta and rows.counts.any():
        channels, places, taken = kept_apart(rows, weights)
        counts = rows.counts

    like = torch.empty((), dtype=dtype, device=sums.device)
    lib = native.kernel("int8", like)
    if lib is None:
        return reference_from_sums(sums, rows, scales, bias, channels, taken).to(dtype)
    y = sums.view(dtype) if dtype == torch.float32 else like.new_empty(sums.shape)
    kept = dict(columns=rows.columns, values=rows.values, counts=counts, places=places, weights=taken)
    sizes = dict(N=len(sums), O=sums.shape[1], most=rows.columns.shape[1], dtype=native.CODES[dtype])
    lib.from_sums(sums=sums, absmax=rows.absmax, scales=scales, bias=bias, **kept, y=y, **sizes)
    return y


def reference_from_sums(sums, rows: Rows, scales, bias, channels: Tensor | None, weights: Tensor | None) -> Tensor:
    """The same with PyTorch, in float32. channels: those that are kept apart anywhere, with their weights."""
    y = sums.float() * (rows.absmax / 127)[:, None]
    if scales is not None:
        y *= scales
    if channels is not None:
        apart = y.new_zeros(rows.codes.shape)
        apart.scatter_(1, rows.columns.long(), rows.values * in_use(rows))
        y += apart[:, channels] @ weights
    if bias is not None:
        y += bias
    return y


def in_use(rows: Rows) -> Tensor:
    """Which of a row's places for what is kept apart are in use, (N, most)."""
    return torch.arange(rows.columns.shape[1], device=rows.counts.device) < rows.counts[:, None]


def kept_apart(rows: Rows, weights: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(the channels kept apart in any row, ascending; where each channel is among them, (C,) int32; their weights)."""
    channels = rows.columns[in_use(rows)].long().unique()
    places = torch.zeros(rows.codes.shape[1], dtype=torch.int32, device=channels.device)
    places[channels] = torch.arange(len(channels), dtype=torch.int32, device=channels.device)
    return channels, places, weights(channels)
