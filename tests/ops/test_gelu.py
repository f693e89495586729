"""Activations by name, beside transformers' own of that name.

python -m pytest tests/ops/test_gelu.py
"""

import pytest
import torch
from transformers.activations import ACT2FN

from minift.ops.gelu import ACTIVATIONS, gelu_erf, gelu_tanh

OPERATORS = {"gelu_erf": gelu_erf, "gelu_tanh": gelu_tanh}  # for test_kernels.py: functions of one matrix


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_gradient_equal_the_peers(name):
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([-1e4, -1e-30, 0.0, 1e-30, 1e4])]).requires_grad_()
    ours, theirs = ACTIVATIONS[name](x), ACT2FN[name](x)
    assert torch.allclose(ours, theirs, atol=2e-6)
    (a,), (b,) = torch.autograd.grad(ours.sum(), x), torch.autograd.grad(theirs.sum(), x)
    finite = b.isfinite()  # the peer's x^3 formulas overflow far out
    assert torch.allclose(a[finite], b[finite], atol=2e-6)


def test_the_two_gelus_differ():
    """Telling them apart is the point of the table: GPT-2's weights were trained with the tanh form."""
    x = torch.linspace(-4, 4, 1001)
    assert (ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_new"](x)).abs().max().item() == pytest.approx(4.7e-4, abs=3e-5)
