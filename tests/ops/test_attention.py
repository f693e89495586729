"""Attention over packed sequences against the plain formula in float64: outputs, gradients, rows, dropout.

python -m pytest tests/ops/test_attention.py
"""

import pytest
import torch
from judging import at_most_twice, greatest

from minift.data.batch import token_keys
from minift.ops import attention as module
from minift.ops.attention import Settings, attention
from minift.ops.dropout import SILENT, Noise, keep

LENGTHS = [1, 63, 7, 2, 130]
SITE = 5


def inputs(lengths=LENGTHS, heads=3, size=7, dtype=torch.float64):
    """q, k, v (N, H, D), offsets (S + 1,) and noise."""
    torch.manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(n, heads, size, dtype=dtype, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    keys = token_keys(
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        torch.cat([torch.arange(m) for m in lengths]),
    )
    return q, k, v, offsets, Noise(1, 2, keys)


def attend(q, k, v, offsets, rows=None, **settings):
    """The operator."""
    return attention(q, k, v, offsets, rows, Settings(**settings))


def plain(q, k, v, offsets, rows=None, *, scale, causal=False, p=0.0, noise=SILENT):
    """One sequence at a time by autograd, the mask written out from the words of dropout.py. Takes all queries."""
    out = []
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        s = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        if causal:
            s = s + torch.full_like(s, -torch.inf).triu(1)
        prob = s.softmax(-1)
        if noise.keys is not None and p > 0:
            words = noise.cols(SITE, (b - a) * q.shape[1]).view(b - a, q.shape[1])  # key position, head
            prob = prob * keep(noise.rows(SITE)[a:b, None, None], words, p).permute(2, 0, 1) / (1 - p)
        out.append(torch.einsum("hqk,khd->qhd", prob, v[a:b]))
    out = torch.cat(out)
    return out if rows is None else out[rows]


@pytest.mark.parametrize("scores", [1 << 18, 1000], ids=["whole heads", "a head at a time"])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("asked", ["all", "some", "one", "none"])
def test_output_and_gradients(asked, causal, p, scores, monkeypatch):
    monkeypatch.setattr(module, "SCORES", scores)
    q, k, v, offsets, noise = inputs()
    rows = {
        "all": None,
        "some": torch.arange(0, 203, 5),
        "one": offsets[:-1],
        "none": torch.tensor([], dtype=torch.int64),
    }[asked]
    want = plain(q, k, v, offsets, rows, scale=0.3, causal=causal, p=p, noise=noise)
    asked_q = q if rows is None else q[rows]
    got = attend(asked_q, k, v, offsets, rows, scale=0.3, causal=causal, p=p, noise=noise.at(rows), site=SITE)
    assert torch.allclose(got, want, atol=1e-12)
    dy = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy), strict=True):
        assert torch.allclose(g, w, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_at_most_twice_plain_pytorchs(dtype, causal):
    """Against float64, forward and every gradient, beside softmax written out in the same dtype."""
    q, k, v, offsets, noise = inputs(dtype=torch.float64, lengths=[1, 7, 63, 200], size=32)
    low = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in low]
    kw = dict(scale=32**-0.5, causal=causal, p=0.1, noise=noise)
    dy = torch.randn_like(q).to(dtype)

    def run(f, tensors, **more):
        out = f(*tensors, offsets, **kw, **more)
        return [out, *torch.autograd.grad(out, tensors, dy.to(out.dtype))]

    truth, ours, theirs = run(plain, exact), run(attend, low, site=SITE), run(plain, low)
    for t, a, b in zip(truth, ours, theirs, strict=True):
        at_most_twice(a, b, t, torch.finfo(dtype).eps * greatest(t))


def test_extreme_scores():
    """Scores of 1e4 and -1e4 neither overflow nor lose the largest."""
    q, k, v, offsets, _ = inputs(dtype=torch.float32)
    with torch.no_grad():
        got = attend(q * 1e3, k * 1e3, v, offsets, scale=1.0)
        want = plain((q * 1e3).double(), (k * 1e3).double(), v.double(), offsets, scale=1.0)
    assert got.isfinite().all() and (got - want).abs().max() < 0.2  # float32 scores of 1e6 have a spacing of 0.06


def test_an_inf_does_not_become_a_number():
    q, k, v, offsets, _ = inputs(dtype=torch.float32, lengths=[3, 4])
    with torch.no_grad():
        v[1, 0, 0] = torch.inf
        got = attend(q, k, v, offsets, scale=1.0)
    assert not got[:3, 0, 0].isfinite().any() and got[3:].isfinite().all()


def test_dropout_does_not_depend_on_the_packing():
    q, k, v, offsets, noise = inputs()
    whole = attend(q, k, v, offsets, scale=0.3, p=0.5, noise=noise, site=SITE)
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = attend(
            q[a:b], k[a:b], v[a:b], torch.tensor([0, b - a]), scale=0.3, p=0.5, noise=noise.at(slice(a, b)), site=SITE
        )
        assert torch.allclose(alone, whole[a:b], atol=1e-12)


def test_no_matrix_of_scores_is_saved():
    q, k, v, offsets, noise = inputs(lengths=[200], heads=2, size=8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attend(q, k, v, offsets, scale=0.3, p=0.5, noise=noise, site=SITE)
    assert sum(sizes) == 3 * q.numel() + 200 * 2  # q, k, v and a number per query and head
