"""Attention over packed sequences: no padding and no mask; a token sees its own sequence only.

    P = softmax(scale * Q K^T)        O = drop(P) V        (per head and sequence; causal: key position <= query's)

backward, with P made again from the kept log-sum-exp instead of being saved (Dao et al., https://arxiv.org/abs/2205.14135):

    dV = drop(P)^T dO    dP = drop'(dO V^T)    dS = P * (dP - sum of P * dP)    dQ = scale * dS K    dK = scale * dS^T Q

N tokens, M query rows, S sequences, H heads, D head size. Dropout's channel number of (head h, key position j) is
j * H + h, which does not depend on the packing (see dropout.py). On the CPU, float32 and bfloat16 run
kernels/cpu/attention.cpp, which holds a tile of scores at a time; on CUDA, bfloat16 and float16 run PyTorch's own
flash kernel (flash.py), with a mask of its own. `reference` says what they have to compute.
"""

import ctypes
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import flash, native
from .dropout import SILENT, Noise, keep, threshold

SCORES = 1 << 18  # scores at hand at once (1 MB in float32): as many heads of a sequence as fit
kept = threading.local()  # what `scratch` keeps from call to call


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    longest: int | None = None,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
    noise: Noise = SILENT,
    site: int = 0,
) -> Tensor:
    """Attention of each sequence to itself, (M, H, D).

    q (M, H, D) are the queries at `rows` (ascending token numbers; None: all tokens), with noise.keys (M,);
    k, v (N, H, D); sequence s holds tokens offsets[s] to offsets[s + 1], `longest` at most (None: not known).
    """
    if p == 0 or noise.keys is None:
        p, noise = 0.0, SILENT
    if flash.takes(q, k, v):
        return flash.flash(q, k, v, offsets, rows, longest, scale, causal, p, noise, site)
    return Attention.apply(q, k, v, offsets, rows, scale, causal, p, noise, site)


class Attention(torch.autograd.Function):
    """Saves q, k, v and one number per query and head (the kernel two).

    Not the output, where flash attention sums dO * O instead of P * dP: a query's whole row of P is at hand here.
    """

    @staticmethod
    def forward(ctx, q, k, v, offsets, rows, *settings) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lib = native.kernel("attention", q, k, v) if q.dtype == k.dtype == v.dtype else None
        shape = q.shape[:2] if lib is None else (2, *q.shape[:2])  # log-sum-exp (M, H), or two numbers that say more
        stats = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
        if lib is None:
            reference(q, k, v, out, stats, offsets, rows, *settings)
        else:
            run(lib, q, k, v, out, stats, (None,) * 4, offsets, rows, *settings)
        ctx.save_for_backward(q, k, v, stats)
        ctx.lib, ctx.settings = lib, (offsets, rows, *settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, stats = ctx.saved_tensors
        if ctx.lib is None:
            gradients = reference_backward(q, k, v, stats, dout, *ctx.settings)
        else:
            gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
            run(ctx.lib, q, k, v, None, stats, (dout, *gradients), *ctx.settings)
        return *gradients, *[None] * 7


def run(lib, q, k, v, out, stats, gradients, offsets, rows, scale, causal, p, noise, site) -> None:
    """The kernel: forward, which writes out and stats, or, where `gradients` is dout, dq, dk, dv, backward."""
    dout, *written = gradients
    q, k, v, dout = (t if t is None or t.stride(2) == 1 else t.contiguous() for t in (q, k, v, dout))
    offsets, rows = offsets.long().contiguous(), None if rows is None else rows.long().contiguous()
    (M, H, D), S = q.shape, len(offsets) - 1
    longest, per_worker = ctypes.c_int64(), ctypes.c_int64()
    lib.attention_scratch(offsets.data_ptr(), S, D, ctypes.byref(longest), ctypes.byref(per_worker))
    workers = max(1, min(torch.get_num_threads(), S * H))
    keys = noise.keys
    dropped = (0, 0, 0) if keys is None else (*noise.salts(site), threshold(p))
    strides = [s for t in (q, k, v, dout) for s in ((0, 0) if t is None else t.stride()[:2])]
    sizes = (ctypes.c_int64 * 18)(M, S, H, D, longest.value, workers, causal, *dropped, *strides)
    tensors = [q, k, v, out, stats, dout, *written, offsets, rows, None if keys is None else keys.contiguous()]
    lib.attention(
        *map(native.pointer, tensors),
        sizes,
        scale,
        1 / (1 - p),
        scratch(per_worker.value * workers).data_ptr(),
        dout is not None,
        native.CODES[q.dtype],
    )


def scratch(size: int) -> Tensor:
    """Working memory for that many floats, about 1.3 MB a thread at 1,024 tokens.

    It stays from call to call, one for each thread that calls: fresh memory costs a page fault every 4 KB.
    """
    if not hasattr(kept, "scratch") or kept.scratch.numel() < size:
        kept.scratch = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept.scratch


def reference(q, k, v, out, lse, offsets, rows, scale, causal, p, noise, site) -> None:
    """Writes out and lse."""
    words = dropout_words(noise, site, offsets, q.shape[1])
    for qs, ks, heads in pieces(offsets, rows, q.shape[1]):
        s = scores(q[qs, heads], k[ks, heads], scale, causal, rows, qs, ks)  # (h, m, n)
        lse_piece = torch.logsumexp(s, -1, keepdim=True)
        prob = s.sub_(lse_piece).exp_()
        drop_(prob, p, words, qs, heads)
        out[qs, heads] = torch.bmm(prob.to(v.dtype), v[ks, heads].transpose(0, 1)).transpose(0, 1)
        lse[qs, heads] = lse_piece.squeeze(-1).t()


def reference_backward(q, k, v, lse, do, offsets, rows, scale, causal, p, noise, site) -> list[Tensor]:
    """dq, dk, dv."""
    words = dropout_words(noise, site, offsets, q.shape[1])
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    for qs, ks, heads in pieces(offsets, rows, q.shape[1]):
        qh, kh, doh = (t.transpose(0, 1) for t in (q[qs, heads], k[ks, heads], do[qs, heads]))  # (h, m or n, D)
        s = scores(q[qs, heads], k[ks, heads], scale, causal, rows, qs, ks)
        prob = s.sub_(lse[qs, heads].t()[..., None]).exp_()  # (h, m, n)
        dprob = torch.bmm(doh, v[ks, heads].permute(1, 2, 0)).to(prob.dtype)
        stays = drop_(dprob, p, words, qs, heads)
        dropped = prob if stays is None else (prob * stays).mul_(1 / (1 - p))
        dv[ks, heads] = torch.bmm(dropped.transpose(1, 2).to(do.dtype), doh).transpose(0, 1)
        delta = (prob * dprob).sum(-1, keepdim=True)  # (h, m, 1)
        ds = dprob.sub_(delta).mul_(prob).mul_(scale).to(q.dtype)
        dq[qs, heads] = torch.bmm(ds, kh).transpose(0, 1)
        dk[ks, heads] = torch.bmm(ds.transpose(1, 2), qh).transpose(0, 1)
    return [dq, dk, dv]


def dropout_words(noise: Noise, site: int, offsets: Tensor, n_heads: int) -> tuple[Tensor, Tensor] | None:
    """The words of query tokens (M,) and of key position and head (longest, H); None where dropout is off."""
    if noise.keys is None:
        return None
    longest = int(offsets.diff().max())
    return noise.rows(site), noise.cols(site, longest * n_heads).view(longest, -1)


def pieces(offsets: Tensor, rows: Tensor | None, n_heads: int) -> Iterator[tuple[slice, slice, slice]]:
    """The work, one piece at a time: query rows, key tokens and heads. A sequence without queries has none."""
    ends = offsets if rows is None else torch.searchsorted(rows, offsets.to(rows.dtype))
    offsets, ends = offsets.tolist(), ends.tolist()
    for s in range(len(offsets) - 1):
        qs, ks = slice(ends[s], ends[s + 1]), slice(offsets[s], offsets[s + 1])
        size = (qs.stop - qs.start) * (ks.stop - ks.start)
        heads = max(1, SCORES // max(1, size))
        for h in range(0, n_heads if size else 0, heads):
            yield qs, ks, slice(h, min(h + heads, n_heads))


def scores(q, k, scale: float, causal: bool, rows: Tensor | None, qs: slice, ks: slice) -> Tensor:
    """scale * q k^T of one piece in at least float32, -inf where a causal query must not look. (h, m, n)"""
    s = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0))
    s = s.to(torch.promote_types(s.dtype, torch.float32)).mul_(scale)
    if causal:
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
