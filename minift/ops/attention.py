"""Attention over packed sequences: no padding and no mask; a token sees its own sequence only.

    P = softmax(scale * Q K^T)        O = drop(P) V        (per head and sequence; causal: key position <= query's)

backward, with P made again from the kept log-sum-exp instead of being saved (Dao et al., https://arxiv.org/abs/2205.14135):

    dV = drop(P)^T dO    dP = drop'(dO V^T)    dS = P * (dP - sum(dO * O))    dQ = scale * dS K    dK = scale * dS^T Q

N tokens, M query rows, S sequences, H heads, D head size. Dropout's channel number of (head h, key position j) is
j * H + h, which does not depend on the packing (see dropout.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dropout import SILENT, Noise, keep

SCORES = 1 << 18  # scores at hand at once (1 MB in float32): as many heads of a sequence as fit


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
    noise: Noise = SILENT,
    site: int = 0,
) -> Tensor:
    """Attention of each sequence to itself, (M, H, D).

    q (M, H, D) are the queries at `rows` (ascending token numbers; None: all tokens), with noise.keys (M,);
    k, v (N, H, D); sequence s holds tokens offsets[s] to offsets[s + 1].
    """
    words = None
    if p > 0 and noise.keys is not None:
        longest = int(offsets.diff().max())
        words = noise.rows(site), noise.cols(site, longest * q.shape[1]).view(longest, -1)
    return Attention.apply(q, k, v, offsets, rows, scale, causal, p, words)


class Attention(torch.autograd.Function):
    """Saves q, k, v, the output and one number per query and head."""

    @staticmethod
    def forward(ctx, q, k, v, offsets, rows, scale, causal, p, words) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))  # (M, H)
        plan = list(pieces(offsets, rows, q.shape[1]))
        for qs, ks, heads in plan:
            s = scores(q[qs, heads], k[ks, heads], scale, causal, rows, qs, ks)  # (h, m, n)
            lse_piece = torch.logsumexp(s, -1, keepdim=True)
            prob = s.sub_(lse_piece).exp_()
            drop_(prob, p, words, qs, heads)
            out[qs, heads] = torch.bmm(prob.to(v.dtype), v[ks, heads].transpose(0, 1)).transpose(0, 1)
            lse[qs, heads] = lse_piece.squeeze(-1).t()
        ctx.save_for_backward(q, k, v, out, lse, rows)
        ctx.settings = plan, scale, causal, p, words
        return out

    @staticmethod
    def backward(ctx, do: Tensor):
        q, k, v, out, lse, rows = ctx.saved_tensors
        plan, scale, causal, p, words = ctx.settings
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        delta = (do * out).sum(-1, dtype=lse.dtype)  # (M, H)
        for qs, ks, heads in plan:
            qh, kh, doh = (t.transpose(0, 1) for t in (q[qs, heads], k[ks, heads], do[qs, heads]))  # (h, m or n, D)
            s = scores(q[qs, heads], k[ks, heads], scale, causal, rows, qs, ks)
            prob = s.sub_(lse[qs, heads].t()[..., None]).exp_()  # (h, m, n)
            dprob = torch.bmm(doh, v[ks, heads].permute(1, 2, 0)).to(prob.dtype)
            kept = drop_(dprob, p, words, qs, heads)
            dropped = prob if kept is None else (prob * kept).mul_(1 / (1 - p))
            dv[ks, heads] = torch.bmm(dropped.transpose(1, 2).to(do.dtype), doh).transpose(0, 1)
            ds = dprob.sub_(delta[qs, heads].t()[..., None]).mul_(prob).mul_(scale).to(q.dtype)
            dq[qs, heads] = torch.bmm(ds, kh).transpose(0, 1)
            dk[ks, heads] = torch.bmm(ds.transpose(1, 2), qh).transpose(0, 1)
        return dq, dk, dv, None, None, None, None, None, None


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
