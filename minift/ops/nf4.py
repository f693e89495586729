"""NF4, four bits a weight (Dettmers et al., QLoRA, https://arxiv.org/abs/2305.14314), to the bit as in bitsandbytes.

    weights, in blocks of 64 of the flat matrix   a = max |w|        c = the level nearest to w / a
    double quantisation, in blocks of 256 of a    b = max |a - m|    d = the level nearest to (a - m) / b    m = mean(a)
    dequantised                                   w ~ LEVELS[c] * (dynamic_levels[d] * b + m)

Two codes share a byte, the first in its high half. LEVELS are quantiles of N(0, 1); the 256 levels of d are an 8-bit
float of their own (Dettmers, https://arxiv.org/abs/1511.04561). A weight costs 4 + 8 / 64 + 32 / (64 * 256) = 4.127
bits. On the CPU, float32 and bfloat16 run kernels/cpu/nf4.cpp; the reference here is the specification.

n weights, N tokens.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

BLOCK, NESTED, GRID = 64, 256, 1 << 16
CHUNK = 1 << 18  # weights worked on at once; a multiple of BLOCK
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@cache
def levels(device: torch.device) -> Tensor:
    """The 16 levels of a code, (16,) float32."""
    return torch.tensor(LEVELS, device=device)


@cache
def pairs(device: torch.device) -> Tensor:
    """The two levels of each byte, (256, 2) float32."""
    byte = torch.arange(256, device=device)
    return levels(device)[torch.stack([byte >> 4, byte & 15], 1)]


@cache
def middles(device: torch.device) -> Tensor:
    """What lies halfway between neighbouring levels, (15,) float32."""
    return (levels(device)[:-1] + levels(device)[1:]) / 2


@cache
def dynamic_levels(device: torch.device) -> Tensor:
    """The 256 levels of double quantisation, (256,) float32: seven decades, each twice as fine as the one below."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = evenly(2**i)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), device=device)


def evenly(n: int) -> Tensor:
    """n + 1 float32 numbers from 0.1 to 1: torch.linspace(0.1, 1, n + 1) as it is on a CPU with fused multiply-add.

    Elsewhere torch's own rounds twice, 42 of the levels are others by a unit, and so are the bytes of a packed weight.
    """
    first = torch.tensor(0.1)  # float32
    step = ((1 - first) / n).double()
    k = torch.arange(n + 1, dtype=torch.float64)
    from_below = first.double() + step * k
    from_above = 1 - step * (n - k)
    return torch.where(k < (n + 1) // 2, from_below, from_above).float()


def nearest(x: Tensor, middle: Tensor) -> Tensor:
    """The number of the level nearest to each x, given what lies halfway between levels; the lower one at a midpoint.

    uint8, of x's shape.
    """
    return torch.bucketize(x, middle, out_int32=True).to(torch.uint8)


def quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, absmax) of a matrix: (ceil(n / 2), 1) uint8 and (ceil(n / 64),) float32. Any floating-point dtype.

    A piece of rows at a time: of a transposed or half-precision matrix no whole copy is made.
    """
    n = w.numel()
    columns = w.shape[1]
    codes = torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-n // BLOCK), device=w.device)
    rows = max(1, CHUNK // (BLOCK * max(1, columns))) * BLOCK  # whole blocks
    for k in range(0, w.shape[0], rows):
        flat = w[k : k + rows].reshape(-1)
        begin = k * columns
        end = begin + len(flat)
        c = codes[begin // 2 : -(-end // 2)]
        a = absmax[begin // BLOCK : -(-end // BLOCK)]
        lib = native.kernel("nf4", flat)
        if lib is None:
            reference_quantize(flat, c, a)
        else:
            dtype = native.CODES[w.dtype]
            lib.quantize(w=flat, middles=middles(w.device), codes=c, absmax=a, n=len(flat), dtype=dtype)
    return codes, absmax


def reference_quantize(flat: Tensor, codes: Tensor, absmax: Tensor) -> None:
    """The equations above: fills codes and absmax for the weights `flat` (n,), a chunk of them at a time."""
    for i in range(0, len(flat), CHUNK):
        x = flat[i : i + CHUNK].float()
        full = len(x) // BLOCK * BLOCK
        blocks = x[:full].view(-1, BLOCK)
        a = blocks.abs().amax(1)
        parts = [(blocks * (1 / a.clamp(min=1e-38))[:, None]).view(-1)]
        if full < len(x):  # the last block is cut short; bitsandbytes divides there
            rest = x[full:].abs().amax().clamp(min=1e-38)
            a = torch.cat([a, rest[None]])
            parts.append(x[full:] / rest)
        c = nearest(torch.cat(parts).clamp_(-1, 1), middles(flat.device))
        if len(c) % 2:
            c = F.pad(c, (0, 1), value=7)  # level 7 is 0
        codes[i // 2 : (i + len(c)) // 2, 0] = c[0::2] << 4 | c[1::2]
        absmax[i // BLOCK : i // BLOCK + len(a)] = a


@cache
def grid(device: torch.device) -> Tensor:
    """The byte for each of 65,536 evenly spaced numbers from -1 to 1: bitsandbytes' CPU code rounds to these first."""
    x = 2.0 * torch.arange(GRID, dtype=torch.float32, device=device) / (GRID - 1) - 1
    level = dynamic_levels(device)
    return nearest(x, (level[:-1] + level[1:]) / 2)


def compress(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: (bytes uint8, nested absmax (ceil(len / 256),), mean ()) of absmax (float32)."""
    mean = absmax.mean()
    x = F.pad(absmax - mean, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    nested = x.abs().amax(1)
    scaled = (x * (1 / nested)[:, None]).clamp_(-1, 1).nan_to_num_(-1.0)  # 0 / 0 in a block of zeros: its bytes are 0
    at = ((scaled + 1) * 0.5).double() * (GRID - 1) + 0.5  # in one rounding, as a fused multiply-add
    return grid(absmax.device)[at.float().int()].view(-1)[: len(absmax)], nested, mean


def expand(d: Tensor, nested: Tensor, mean: Tensor) -> Tensor:
    """absmax (float32) from its bytes: the inverse of compress, but for what they lost."""
    found = dynamic_levels(d.device)[d.int()]
    return found * nested.repeat_interleave(NESTED)[: len(d)] + mean


def dequantize(
    codes: Tensor, absmax: Tensor, out: Tensor, nested: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """Fills `out` (contiguous, any floating-point dtype) with the weights: products in float32, rounded once.

    absmax (float32), or with nested and mean its bytes, as compress gave them.
    """
    twice = nested is not None
    lib = native.kernel("nf4", out)
    if lib is None:
        if twice:
            absmax = expand(absmax, nested, mean)
        return reference_dequantize(codes, absmax, out)

    # the kernel takes the scales as they are, or in their four parts
    absmax = absmax.contiguous()
    scales = dict(absmax=absmax, d=None, b=None, m=None, second=None)
    if twice:
        nested = nested.contiguous()
        scales = dict(absmax=None, d=absmax, b=nested, m=mean, second=dynamic_levels(out.device))
    codes = codes.contiguous()
    n = out.numel()
    lib.dequantize(codes=codes, pairs=pairs(out.device), **scales, out=out, n=n, dtype=native.CODES[out.dtype])
    return out


def reference_dequantize(codes: Tensor, absmax: Tensor, out: Tensor) -> Tensor:
    """The same with PyTorch, a chunk at a time; absmax float32."""
    flat = out.view(-1)
    for i in range(0, len(flat), CHUNK):
        part = flat[i : i + CHUNK]
        bytes_ = codes.view(-1)[i // 2 : -(-(i + len(part)) // 2)]
        w = F.embedding(bytes_.int(), pairs(codes.device)).view(-1)[: len(part)]
        a = absmax[i // BLOCK :]
        full = len(part) // BLOCK * BLOCK
        torch.mul(w[:full].view(-1, BLOCK), a[: full // BLOCK, None], out=w[:full].view(-1, BLOCK))
        if full < len(part):
            w[full:] *= a[full // BLOCK]
        part.copy_(w)
    return out


_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory that all dequantised matrices use, one after the other: (rows, columns), valid until the next call."""
    key = device, dtype
    n = rows * columns
    if key not in _scratch or _scratch[key].numel() < n:
        _scratch.pop(key, None)  # before the larger one is there
        with torch.inference_mode(False):  # or it could not be used in training later
            _scratch[key] = torch.empty(n, dtype=dtype, device=device)
    return _scratch[key][:n].view(rows, columns)
