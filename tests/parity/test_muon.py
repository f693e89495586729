"""Muon beside torch.optim.Muon and torch.optim.AdamW, and its Newton-Schulz steps beside singular values in float64.

python -m pytest tests/parity/test_muon.py
"""

import math

import pytest
import torch
from helpers import small_bert

import minift
from minift.engine.optim import make_optimizer
from minift.engine.optimizers import Optimizer, muon

SHAPES = [(7, 5), (3, 11), (16, 16), (1, 6), (9, 1)]


def pairs(shapes):
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return mine, [torch.nn.Parameter(p.detach().clone()) for p in mine]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("beta1", [0.95, 0.5])
@pytest.mark.parametrize("fast, bound", [(True, 1e-6), (False, 1e-2)])
def test_twenty_steps_are_torchs(beta1, decay, fast, bound, monkeypatch):
    """In bfloat16, which is all that torch does, within 1e-6; in float32 as near as bfloat16 is. lr 0.01."""
    monkeypatch.setattr(muon, "native_bf16", lambda device: (fast, ""))
    torch.manual_seed(0)
    mine, theirs = pairs(SHAPES)
    ours = Optimizer(muon, [{"params": mine, "weight_decay": decay, "matrices": True}], lr=0.01, beta1=beta1)
    peer = torch.optim.Muon(theirs, lr=0.01, momentum=beta1, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    for step in range(20):
        ours.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = 0.01 / (1 + step)
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = torch.randn_like(p) if (step + i) % 4 else None
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        peer.step()
        for p, q in zip(mine, theirs, strict=True):
            assert (p - q).abs().max() < bound
            if p in ours.state:
                assert ours.state[p].keys() == peer.state[q].keys() == {"momentum_buffer"}
                assert torch.equal(ours.state[p]["momentum_buffer"], peer.state[q]["momentum_buffer"])


def test_float32_is_float64s_to_1e_5(monkeypatch):
    """The same equations, the polynomial applied to the singular values."""
    monkeypatch.setattr(muon, "native_bf16", lambda device: (False, ""))
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Optimizer(muon, [{"params": params, "weight_decay": 0.1, "matrices": True}], lr=0.01)
    expected = [p.detach().double() for p in params]
    momenta = [torch.zeros(p.shape).double() for p in params]
    a, b, c = muon.QUINTIC
    for _ in range(20):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momenta[i] = 0.95 * momenta[i] + 0.05 * p.grad.double()
            u, s, v = torch.linalg.svd(0.95 * momenta[i] + 0.05 * p.grad.double(), full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = a * s + b * s**3 + c * s**5
            scale = 0.2 * math.sqrt(max(p.shape))
            expected[i] = expected[i] * (1 - 0.01 * 0.1) - 0.01 * scale * (u * s) @ v
        optimizer.step()
        for p, weight in zip(params, expected, strict=True):
            assert (p - weight).abs().max() < 1e-5


@pytest.mark.parametrize("fast", [True, False])
def test_singular_values_come_near_1(fast, monkeypatch):
    monkeypatch.setattr(muon, "native_bf16", lambda device: (fast, ""))
    torch.manual_seed(0)
    for shape in ((64, 24), (8, 100), (100, 8)):
        for scale in (1e-5, 1.0, 1e5):
            found = torch.linalg.svdvals(muon.orthogonalize(torch.randn(shape) * scale))
            assert 0.3 < found.min() and found.max() < 1.3, (shape, scale)
    assert torch.equal(muon.orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_the_rest_is_adamws(tmp_path):
    """Embeddings, head, biases and norms, over 20 steps; the settings are AdamW's, but for beta1."""
    model, _ = minift.load(small_bert(tmp_path), task="classify")
    optimizer = make_optimizer(model, 1e-3, 0.1, name="muon", beta2=0.99, eps=1e-7)
    groups = [group for group in optimizer.param_groups if not group["matrices"]]
    rest = {id(p) for group in groups for p in group["params"]}
    for key, p in model.named_parameters():
        hidden = p.ndim == 2 and "embeddings" not in key and not key.startswith("head")
        assert (id(p) not in rest) == hidden, key
    mine = [p for group in groups for p in group["params"]]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    copies = dict(zip(mine, theirs, strict=True))
    peer = torch.optim.AdamW(
        [{"params": [copies[p] for p in g["params"]], "weight_decay": g["weight_decay"]} for g in groups],
        lr=1e-3, betas=(0.9, 0.99), eps=1e-7, fused=True,
    )  # fmt: skip
    for _ in range(20):
        for p, q in copies.items():
            p.grad = q.grad = torch.randn_like(p)
        optimizer.step()
        peer.step()
    assert all(torch.equal(p, q) for p, q in copies.items())
