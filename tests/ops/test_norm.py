"""Dropout + residual + layer norm against float64.

python -m pytest tests/ops/test_norm.py
"""

import pytest
import torch

from minift.data.batch import token_keys
from minift.ops.dropout import Noise, dropout
from minift.ops.norm import add_norm, layer_norm

KEYS = token_keys(torch.arange(63), torch.zeros(63, dtype=torch.int64))

# for test_kernels.py: functions of one matrix
OPERATORS = {
    "add_norm": lambda x: add_norm(x, x * 0.5, *torch.ones(2, x.shape[1]), 1e-5, 0.1, Noise(5, 6, KEYS[: len(x)]), 1)
}


@pytest.mark.parametrize("width", [1, 7, 63, 1023])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(width, p):
    torch.manual_seed(0)
    x, residual, weight, bias = (
        torch.randn(*s, requires_grad=True) for s in ((63, width), (63, width), (width,), (width,))
    )
    noise = Noise(1, 2, KEYS)
    h, y = add_norm(x, residual, weight, bias, 1e-5, p, noise, 4)

    xd, rd, wd, bd = (t.detach().double().requires_grad_() for t in (x, residual, weight, bias))
    hd = rd + dropout(xd, p, noise, 4)
    mean, var = hd.mean(-1, keepdim=True), hd.var(-1, unbiased=False, keepdim=True)
    yd = (hd - mean) / (var + 1e-5).sqrt() * wd + bd
    assert torch.allclose(h.double(), hd, atol=1e-6) and torch.allclose(y.double(), yd, atol=2e-5)
    dh, dy = torch.randn_like(h), torch.randn_like(y)
    ours = torch.autograd.grad((h, y), (x, residual, weight, bias), (dh, dy))
    want = torch.autograd.grad((hd, yd), (xd, rd, wd, bd), (dh.double(), dy.double()))
    for a, b in zip(ours, want, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-4, rtol=1e-4)


def test_bfloat16_in_bfloat16_out():
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    assert layer_norm(x, torch.ones(8), torch.zeros(8), 1e-5).dtype == torch.bfloat16
