"""What backward recomputes: the same bits, and less that is kept.

python -m pytest tests/ops/test_rematerialise.py
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from minift.data.batch import token_keys
from minift.ops import native
from minift.ops.dropout import SILENT, Noise
from minift.ops.gelu import gelu_erf, gelu_tanh
from minift.ops.norm import add_norm
from minift.ops.rematerialise import Recipe, rematerialisable, rematerialise

N, C = 37, 65


def layer(weights: list, act, noise: Noise) -> torch.Tensor:
    """A norm that two linear layers want, an activation that one wants."""
    w, (gain, bias) = weights[:3], weights[3:]
    h, y = add_norm(w[0], torch.ones(N, C, dtype=w[0].dtype), gain, bias, 1e-5, 0.1, noise, 3)
    return F.linear(act(F.linear(y, w[1], bias)), w[2]).pow(2).sum() + F.linear(y, w[2]).sum() + h.sum()


@pytest.mark.parametrize("mode", ["native", "reference"])
@pytest.mark.parametrize("act", [gelu_erf, gelu_tanh])
@pytest.mark.parametrize("noise", [SILENT, Noise(1, 2, token_keys(torch.arange(N), torch.arange(N)))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_bit(mode, act, noise, dtype, monkeypatch):
    monkeypatch.setattr(native, "mode", mode)
    torch.manual_seed(0)
    shapes = (N, C), (C, C), (C, C), (C,), (C,)
    weights = [torch.randn(s, dtype=dtype if len(s) > 1 else torch.float32).to(dtype).requires_grad_() for s in shapes]
    plain = torch.autograd.grad(layer(weights, act, noise), weights)
    made, call = [], Recipe.__call__
    monkeypatch.setattr(Recipe, "__call__", lambda self: made.append(self) or call(self))
    with rematerialise():
        loss = layer(weights, act, noise)
    found = torch.autograd.grad(loss, weights)
    assert len(made) == 3 and len(set(map(id, made))) == 2  # asked for three times, made twice
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_marked_tensor_is_not_kept():
    x, w = torch.randn(N, C, requires_grad=True), torch.randn(C, C, requires_grad=True)
    with rematerialise():
        y = rematerialisable(x.exp().clone(), lambda: x.detach().exp())
        z = F.linear(y, w)
    gone = weakref.ref(y)
    del y
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(torch.autograd.grad(z.sum(), w)[0], x.detach().exp().sum(0).expand(C, C))


def test_without_gradients_nothing_is_marked():
    with torch.no_grad():
        assert not hasattr(gelu_tanh(torch.randn(3, 4)), "recipe")
