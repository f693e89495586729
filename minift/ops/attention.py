"""Attention over packed sequences: no padding and no mask; a token sees its own sequence only.

    P = softmax(scale * Q K^T)        O = drop(P) V        (per head and sequence; causal: key position <= query's)

backward, with P made again from the kept log-sum-exp instead of being saved (Dao et al.,
https://arxiv.org/abs/2205.14135):

    dV = drop(P)^T dO    dP = drop'(dO V^T)    dS = P * (dP - sum of P * dP)    dQ = scale * dS K    dK = scale * dS^T Q

N tokens, M query rows, S sequences, H heads, D head size. Dropout's channel number of (head h, key position j) is
j * H + h, which does not depend on the packing (see dropout.py). On the CPU, float32 and bfloat16 run
kernels/cpu/attention.cpp, which holds a tile of scores at a time; on CUDA, bfloat16 and float16 run PyTorch's own
flash kernel (flash.py), with a mask of its own. `reference` says what they have to compute.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import flash, native
from .dropout import SILENT, Noise, keep, threshold
from .sources import Within

SCORES = 1 << 18  # scores at hand at once (1 MB in float32): as many heads of a sequence as fit
kept = threading.local()  # what `scratch` keeps from call to call


@dataclass(frozen=True)
class Settings:
    """What attention is told beside its tensors."""

    scale: float
    causal: bool = False
    p: float = 0.0  # of dropout
    noise: Noise = SILENT  # of the queries: keys (M,)
    site: int = 0  # number of the dropout place
    longest: int | None = None  # the most tokens that a sequence has; None: not known


def attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, rows: Tensor | None, settings: Settings) -> Tensor:
    """Attention of each sequence to itself, (M, H, D).

    q (M, H, D) are the queries at `rows` (ascending token numbers; None: all tokens); k, v (N, H, D); sequence s holds
    tokens offsets[s] to offsets[s + 1].
    """
    if not settings.noise.drops(settings.p):
        settings = replace(settings, p=0.0, noise=SILENT)
    if flash.takes(q, k, v):
        return flash.flash(q, k, v, offsets, rows, settings)
    return Attention.apply(q, k, v, offsets, rows, settings)


class Attention(torch.autograd.Function):
    """Saves q, k, v and one number per query and head (the kernel two).

    The output is not saved: flash attention needs it to sum dO * O instead of P * dP, but here a query's whole row of P
    is at hand.
    """

    @staticmethod
    def forward(ctx, q, k, v, offsets, rows, settings) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        M, H, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        lib = native.kernel("attention", q, k, v)
        if lib is None:
            stats = q.new_empty((M, H), dtype=wide)  # log-sum-exp
            reference(q, k, v, out, stats, offsets, rows, settings)
        else:
            stats = q.new_empty((2, M, H), dtype=wide)  # the largest score, and the sum of exp(score - largest)
            run(lib, (q, k, v), stats, offsets, rows, settings, out=out)
        ctx.save_for_backward(q, k, v, stats)
        ctx.lib = lib
        ctx.given = offsets, rows, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, stats = ctx.saved_tensors
        if ctx.lib is None:
            gradients = reference_backward(q, k, v, stats, dout, *ctx.given)
        else:
            gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
            run(ctx.lib, (q, k, v), stats, *ctx.given, dout=dout, gradients=gradients)
        return *gradients, None, None, None


def run(
    lib, qkv, stats, offsets, rows, settings: Settings, *, out=None, dout=None, gradients=(None, None, None)
) -> None:
    """The kernel: forward, which writes out and stats, or backward from dout, which writes the gradients of qkv."""
    q, k, v = (with_near_channels(t) for t in qkv)
    if dout is not None:
        dout = with_near_channels(dout)
    dq, dk, dv = gradients
    offsets = offsets.long().contiguous()
    if rows is not None:
        rows = rows.long().contiguous()
    M, H, D = q.shape
    S = len(offsets) - 1
    tensors = dict(q=strided(q), k=strided(k), v=strided(v), out=out, stats=stats, offsets=offsets, rows=rows)
    tensors |= dict(dout=strided(dout), dq=dq, dk=dk, dv=dv)

    # a worker is a thread's share: it takes the next piece of work, and has scratch memory of its own
    found = offsets.new_empty(2)
    lib.attention_scratch(offsets=offsets, S=S, D=D, found=found)
    longest, per_worker = found.tolist()
    workers = max(1, min(torch.get_num_threads(), S * H))
    memory = scratch(per_worker * workers)
    sizes = dict(M=M, S=S, H=H, D=D, longest=longest, workers=workers, scratch=memory)

    # the kernel makes dropout's words itself, from the keys of the queries and from key positions
    noise = settings.noise
    keys = None
    salt_row = salt_col = limit = 0
    if noise.drops(settings.p):
        keys = noise.keys.contiguous()
        salt_row, salt_col = noise.salts(settings.site)
        limit = threshold(settings.p)
    drop = dict(keys=keys, salt_row=salt_row, salt_col=salt_col, threshold=limit, inverse=1 / (1 - settings.p))

    how = dict(scale=settings.scale, causal=settings.causal, backward=dout is not None, dtype=native.CODES[q.dtype])
    lib.attention(**tensors, **sizes, **drop, **how)


def with_near_channels(t: Tensor) -> Tensor:
    """t (.., H, D), or a copy, in which the D numbers of a head are neighbours."""
    return t if t.stride(2) == 1 else t.contiguous()


def strided(t: Tensor | None) -> Within:
    """`struct Strided` of kernels/attention.h."""
    if t is None:
        return Within((0, 0, 0), ())
    row, head, _ = t.stride()
    return Within((t.data_ptr(), row, head), (t,))


def scratch(size: int) -> Tensor:
    """Working memory for that many floats, about 1.3 MB a thread at 1,024 tokens.

    It stays from call to call, one for each thread that calls: fresh memory costs a page fault every 4 KB.
    """
    if not hasattr(kept, "scratch") or kept.scratch.numel() < size:
        kept.scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept.scratch


def reference(q, k, v, out, lse, offsets, rows, settings: Settings) -> None:
    """Writes out (M, H, D) and lse, the log-sum-exp (M, H)."""
    words = dropout_words(settings, offsets, q.shape[1])
    for qs, ks, heads in pieces(offsets, rows, q.shape[1]):
        s = scores(q[qs, heads], k[ks, heads], settings, rows, qs, ks)  # (h, m, n)
        lse_piece = torch.logsumexp(s, -1, keepdim=True)
        prob = s.sub_(lse_piece).exp_()
        drop_(prob, settings.p, words, qs, heads)
        out[qs, heads] = torch.bmm(prob.to(v.dtype), v[ks, heads].transpose(0, 1)).transpose(0, 1)
        lse[qs, heads] = lse_piece.squeeze(-1).t()


def reference_backward(q, k, v, lse, do, offsets, rows, settings: Settings) -> list[Tensor]:
    """dq, dk, dv."""
    scale, p = settings.scale, settings.p
    words = dropout_words(settings, offsets, q.shape[1])
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for qs, ks, heads in pieces(offsets, rows, q.shape[1]):
        qh = q[qs, heads].transpose(0, 1)  # (h, m, D)
        kh = k[ks, heads].transpose(0, 1)  # (h, n, D)
        doh = do[qs, heads].transpose(0, 1)  # (h, m, D)
        s = scores(q[qs, heads], k[ks, heads], settings, rows, qs, ks)
        prob = s.sub_(lse[qs, heads].t()[..., None]).exp_()  # (h, m, n)
        dprob = torch.bmm(doh, v[ks, heads].permute(1, 2, 0)).to(prob.dtype)
        stays = drop_(dprob, p, words, qs, heads)
        dropped = prob
        if stays is not None:
            dropped = (prob * stays).mul_(1 / (1 - p))
        dv[ks, heads] = torch.bmm(dropped.transpose(1, 2).to(do.dtype), doh).transpose(0, 1)
        delta = (prob * dprob).sum(-1, keepdim=True)  # (h, m, 1)
        ds = dprob.sub_(delta).mul_(prob).mul_(scale).to(q.dtype)
        dq[qs, heads] = torch.bmm(ds, kh).transpose(0, 1)
        dk[ks, heads] = torch.bmm(ds.transpose(1, 2), qh).transpose(0, 1)
    return [dq, dk, dv]


def dropout_words(settings: Settings, offsets: Tensor, n_heads: int) -> tuple[Tensor, Tensor] | None:
    """The words of query tokens (M,) and of key position and head (longest, H); None where nothing is dropped."""
    noise = settings.noise
    if not noise.drops(settings.p):
        return None
    longest = int(offsets.diff().max())
    return noise.rows(settings.site), noise.cols(settings.site, longest * n_heads).view(longest, -1)


def pieces(offsets: Tensor, rows: Tensor | None, n_heads: int) -> Iterator[tuple[slice, slice, slice]]:
    """The work, one piece at a time: query rows, key tokens and heads. A sequence without queries has none."""
    ends = offsets if rows is None else torch.searchsorted(rows, offsets.to(rows.dtype))
    offsets = offsets.tolist()
    ends = ends.tolist()
    for s in range(len(offsets) - 1):
        qs = slice(ends[s], ends[s + 1])
        ks = slice(offsets[s], offsets[s + 1])
        size = (qs.stop - qs.start) * (ks.stop - ks.start)
        if size == 0:
            continue
        heads = max(1, SCORES // size)
        for h in range(0, n_heads, heads):
            yield qs, ks, slice(h, min(h + heads, n_heads))


def scores(q, k, settings: Settings, rows: Tensor | None, qs: slice, ks: slice) -> Tensor:
    """scale * q k^T of one piece in at least float32, -inf where a causal query must not look. (h, m, n)"""
    s = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0))
    s = s.to(torch.promote_types(s.dtype, torch.float32)).mul_(settings.scale)
    if settings.causal:
        at = torch.arange(ks.start, ks.stop, device=q.device)
        asked = at if rows is None else rows[qs]
        s.masked_fill_(at > asked[:, None], -torch.inf)
    return s


def drop_(prob: Tensor, p: float, words, qs: slice, heads: slice) -> Tensor | None:
    """Dropout of one piece (h, m, n), in place. Returns what was kept, or None where dropout is off."""
    if words is None:
        return None
    row, col = words
    kept = keep(row[qs, None], col[: prob.shape[2], heads].t().unsqueeze(1), p)  # (m, 1) ^ (h, 1, n)
    prob.mul_(kept).mul_(1 / (1 - p))
    return kept
