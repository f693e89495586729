"""Gradients of a table: those of PyTorch's embedding, wherever they are added to.

python -m pytest tests/ops/test_embedding.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minift.ops.embedding import rows
from minift.ops.loss import linear_cross_entropy


def gradient(embed, ids, weight, is_tied, batches=1):
    """weight.grad after so many backward passes of a tiny language model, or of a sum."""
    weight = nn.Parameter(weight.clone())
    for i in range(batches):
        h = embed(ids.roll(i), weight).tanh()
        if is_tied:
            loss, _ = linear_cross_entropy(h, weight, None, ids.flip(0))
        else:
            loss = (h * h).sum()
        loss.backward()
    return weight.grad


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("n", [0, 1, 37])
def test_gradients_are_torchs_to_the_bit(n, is_tied, batches):
    torch.manual_seed(n)
    ids, weight = torch.randint(0, 9, (n,)), torch.randn(11, 5)
    ours = gradient(rows, ids, weight, is_tied, batches)
    assert ours.layout == torch.strided
    assert ours.equal(gradient(F.embedding, ids, weight, is_tied, batches))


def test_a_gradient_that_is_asked_for_by_name_is_whole():
    """By torch.autograd.grad, too, and where .grad is there already: then it is left alone."""
    ids, weight = torch.tensor([3, 1, 3]), torch.randn(6, 4)
    for embed in (rows, F.embedding):
        p = nn.Parameter(weight.clone())
        p.grad = torch.ones_like(p)
        loss, _ = linear_cross_entropy(embed(ids, p), p, None, ids)
        (found,) = torch.autograd.grad(loss, p)
        assert p.grad.equal(torch.ones_like(p))
        if embed is rows:
            ours = found
    assert ours.equal(found)


class Sizes(TorchDispatchMode):
    """The largest tensor of each operator."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and "view" not in str(function):
            self.found.append((str(function), out.numel()))
        return out


def test_a_tied_table_has_one_gradient_and_no_second_table():
    weight = nn.Parameter(torch.randn(500, 4))
    ids = torch.arange(7)
    loss, _ = linear_cross_entropy(rows(ids, weight), weight, None, ids)
    with Sizes() as sizes:
        loss.backward()
    made = {name for name, n in sizes.found if n == weight.numel()}
    assert made <= {"aten.mul_.Tensor", "aten.index_add_.default", "aten.detach.default"}, made
