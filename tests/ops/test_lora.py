"""The low-rank product against the plain formula in float64: outputs, gradients, dropout; and what it saves.

python -m pytest tests/ops/test_lora.py
"""

import pytest
import torch
from judging import at_most_twice

from minift.data.batch import token_keys
from minift.ops.dropout import SILENT, Noise, keep
from minift.ops.linear import ByMatrix
from minift.ops.lora import lora_linear

SITE = 70000


def lora_of_ones(x):
    """x + drop(x) 1 1^T / C."""
    A, W = torch.ones(1, x.shape[1]) / x.shape[1], torch.eye(x.shape[1])
    noise = Noise(5, 6, token_keys(torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64)))
    drop = noise.drop(0.1, 1, x.shape[1])
    return lora_linear(x, None, A, torch.ones(x.shape[1], 1), ByMatrix(lambda dtype: W.to(dtype)), 1.0, drop)


OPERATORS = {"lora": lora_of_ones}  # for test_kernels.py: functions of one matrix


def inputs(n=13, width=7, out=11, rank=3, dtype=torch.float64):
    """x, bias, A, B, W and noise."""
    g = torch.Generator().manual_seed(0)
    shapes = ((n, width), (out,), (rank, width), (out, rank), (out, width))
    x, bias, A, B, W = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    for t in (x, bias, A, B):
        t.requires_grad_()
    return x, bias, A, B, W, Noise(1, 2, token_keys(torch.arange(n), torch.arange(n) % 5))


def plain(x, bias, A, B, W, scale, p, noise):
    """The equation by autograd, the mask written out."""
    dropped = x
    if p and noise.keys is not None:
        mask = keep(noise.rows(SITE)[:, None], noise.cols(SITE, x.shape[1]), p)
        dropped = x * mask / (1 - p)
    y = x @ W.to(x.dtype).t() + scale * (dropped @ A.to(x.dtype).t()) @ B.to(x.dtype).t()
    return y if bias is None else y + bias


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("n", [1, 13, 0])
def test_output_and_gradients(n, with_bias, p):
    x, bias, A, B, W, noise = inputs(n)
    bias = bias if with_bias else None
    want = plain(x, bias, A, B, W, 1.7, p, noise)
    got = lora_linear(x, bias, A, B, ByMatrix(lambda dtype: W.to(dtype)), 1.7, noise.drop(p, SITE, x.shape[1]))
    assert torch.allclose(got, want, atol=1e-12)
    dy = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tensors = [t for t in (x, bias, A, B) if t is not None]
    for g, w in zip(torch.autograd.grad(got, tensors, dy), torch.autograd.grad(want, tensors, dy), strict=True):
        assert torch.allclose(g, w, atol=1e-12)


def test_silence_turns_dropout_off():
    x, bias, A, B, W, _ = inputs()
    got = lora_linear(x, bias, A, B, ByMatrix(lambda dtype: W), 2.0, SILENT.drop(0.5, SITE, x.shape[1]))
    assert torch.allclose(got, plain(x, bias, A, B, W, 2.0, 0.0, SILENT), atol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("learns", ["both", "B alone"])
def test_what_is_saved(learns, p):
    """x once and R numbers a token; nothing of width `out`; no x where A does not learn (LoRA-FA)."""
    n, width, out, rank = 50, 64, 192, 4
    x, bias, A, B, W, noise = inputs(n, width, out, rank, torch.float32)
    A.requires_grad_(learns == "both")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, bias.detach(), A, B, ByMatrix(lambda dtype: W), 1.0, noise.drop(p, SITE, x.shape[1]))
    activations = [t for t in saved if t.data_ptr() not in (A.data_ptr(), B.data_ptr())]
    assert sum(t.numel() for t in activations) == n * rank + (n * width if learns == "both" else 0)
    assert learns == "B alone" or any(t.data_ptr() == x.data_ptr() for t in activations)  # itself, no copy


def test_low_precision_activations_and_float32_adapters():
    """bf16 x and W: output bf16, gradients of A and B float32; error at most twice that of the plain formula."""
    x, _, A, B, W, noise = inputs(64, 32, 48, 4, torch.float32)
    low, dy = x.detach().bfloat16().requires_grad_(), torch.randn(64, 48, generator=torch.Generator().manual_seed(3))
    exact_x = low.detach().double().requires_grad_()
    exact_AB = [t.detach().double().requires_grad_() for t in (A, B)]
    exact = plain(exact_x, None, *exact_AB, W.bfloat16().double(), 2.0, 0.1, noise)
    wants = (exact, *torch.autograd.grad(exact, (exact_x, *exact_AB), dy.bfloat16().double()))

    def run(f):
        y = f()
        return (y, *torch.autograd.grad(y, (low, A, B), dy.bfloat16()))

    drop = noise.drop(0.1, SITE, low.shape[1])
    mine = run(lambda: lora_linear(low, None, A, B, ByMatrix(lambda dtype: W.to(dtype)), 2.0, drop))
    theirs = run(lambda: plain(low, None, A, B, W.bfloat16(), 2.0, 0.1, noise))
    assert mine[0].dtype == mine[1].dtype == torch.bfloat16 and mine[2].dtype == mine[3].dtype == torch.float32
    for got, peer, want in zip(mine, theirs, wants, strict=True):
        at_most_twice(got, peer, want, size=torch.norm)
