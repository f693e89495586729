"""Sums in one order: the same bits however rows are divided into calls, and the values of PyTorch.

python -m pytest tests/ops/test_in_order.py
"""

import pytest
import torch
from helpers import sequence
from judging import at_most_twice, greatest, needs_compiler

from minift.data.batch import pack, token_keys
from minift.ops import in_order, native
from minift.ops.dropout import Noise, keep
from minift.ops.in_order import sums_in_order
from minift.ops.linear import ByMatrix
from minift.ops.lora import lora_linear
from minift.ops.loss import linear_cross_entropy

needs_compiler(allow_module_level=True)

SIZES = (7, 1, 2, 33, 1, 5, 40, 3)  # rows of each example
N = sum(SIZES)
DIVISIONS = [(8,), (1,) * 8, (3, 5), (1, 6, 1)]  # examples of each call
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


def draw(*shape, dtype=torch.float32, learns=True):
    """The same numbers for the same shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(learns)


def batch_of(sizes):
    """Examples of so many tokens, all of them asked about."""
    return pack([sequence(i, [5] * n, range(n), range(n)) for i, n in enumerate(sizes)])


def in_parts(f, division, x, dy, parameters):
    """[y, dx, gradient of each parameter] of `f` on the rows of x, so many examples a call."""
    for p in parameters:
        p.grad = None
    ys, dxs = [], []
    sizes, begin = list(SIZES), 0
    for n in division:
        batch = batch_of(sizes[:n])
        del sizes[:n]
        rows = slice(begin, begin + len(batch.ids))
        with sums_in_order(batch):
            part = x.detach()[rows].requires_grad_()
            y = f(part, begin)
            y.backward(dy[rows] if y.dim() else None)
        ys.append(y.detach().reshape(-1, *y.shape[1:]))
        dxs.append(part.grad)
        begin = rows.stop
    return [torch.cat(ys), torch.cat(dxs), *(p.grad.clone() for p in parameters)]


def unit_of(want, dtype):
    """What an error may be besides, as in judge; of few numbers in bfloat16 a unit of theirs, for luck rules there."""
    few = want.numel() < 50
    return torch.finfo(dtype if few else torch.float32).eps * greatest(want)


@TYPES
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("width, out, rank", [(64, 128, 8), (70, 33, 3), (1, 2, 1), (130, 65, 16), (96, 50, 40)])
def test_lora(width, out, rank, p, dtype):
    """Every rank, beyond what the kernel holds at once too; judged by float64 beside the formula in PyTorch."""
    x, dy = draw(N, width, dtype=dtype), draw(N, out, dtype=dtype, learns=False)
    A, B = draw(rank, width), draw(out, rank)
    keys = token_keys(torch.arange(N), torch.zeros(N, dtype=torch.int64))
    drop = Noise(1, 2, keys).drop(p, 3, width)

    def ours(part, begin):
        some = drop and drop._replace(row=drop.row[begin : begin + len(part)])
        # the frozen layer is none of this file's: rows of zeros
        return lora_linear(part, None, A, B, ByMatrix(lambda dtype: torch.zeros(out, width, dtype=dtype)), 1.7, some)

    found = [in_parts(ours, division, x, dy, (A, B)) for division in DIVISIONS]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))

    def plain(wide):
        inputs = [t.detach().to(wide).requires_grad_() for t in (x, A, B)]
        low, a, b = inputs
        if p:
            low = low * keep(drop.row[:, None], drop.col, p) / (1 - p)
        y = 1.7 * (low @ a.t()) @ b.t()
        return [y, *torch.autograd.grad(y, inputs, dy.to(wide))]

    for got, peer, want in zip(found[0], plain(dtype), plain(torch.float64), strict=True):
        at_most_twice(got, peer, want, unit_of(want, dtype))


@TYPES
@pytest.mark.parametrize("width, out", [(64, 64), (70, 3), (1, 1), (33, 130)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_layer_of_floats(with_bias, width, out, dtype):
    x, dy = draw(N, width, dtype=dtype), draw(N, out, dtype=dtype, learns=False)
    W, bias = draw(out, width), draw(out)
    parameters = (W, bias) if with_bias else (W,)
    found = [
        in_parts(lambda part, _: in_order.linear(part, W, bias if with_bias else None), division, x, dy, parameters)
        for division in DIVISIONS
    ]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))

    def plain(wide):
        inputs = [t.detach().to(wide).requires_grad_() for t in (x, *parameters)]
        y = torch.nn.functional.linear(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy.to(wide))]

    for got, peer, want in zip(found[0], plain(dtype), plain(torch.float64), strict=True):
        at_most_twice(got, peer, want, unit_of(want, dtype))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_classifier(smoothing):
    """Gradients that go on, in the scale of the whole step; those of PyTorch; the loss of each row."""
    x, W, bias = draw(N, 40), draw(3, 40), draw(3)
    targets = torch.arange(N) % 3
    targets[7] = -1  # only fills up the batch
    found = []
    for division in DIVISIONS:
        each = torch.full((N,), torch.nan)

        def loss(part, begin, each=each):
            rows = slice(begin, begin + len(part))
            return linear_cross_entropy(part, W, bias, targets[rows], smoothing, each[rows])[0] / 60

        ones = torch.ones(N)
        losses, *gradients = in_parts(loss, division, x, ones, (W, bias))
        assert losses.sum() == pytest.approx(each.sum().item() / 60)
        found.append([each, *gradients])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    inputs = [t.detach().double().requires_grad_() for t in (x, W, bias)]
    z = torch.nn.functional.linear(*inputs)
    want = torch.nn.functional.cross_entropy(z, targets, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    for got, gradient in zip(found[0][1:], torch.autograd.grad(want / 60, inputs), strict=True):
        assert torch.allclose(got.double(), gradient, atol=1e-6)


def test_it_holds_inside_alone():
    """A gradient that is asked for afterwards is given back, and nothing is added to the one that is there."""
    x, W = draw(5, 8), draw(3, 8)
    with sums_in_order(batch_of([2, 3])):
        in_order.linear(x, W, None).sum().backward()
    before = W.grad.clone()
    (found,) = torch.autograd.grad(in_order.linear(x, W, None).sum(), W)
    assert torch.equal(W.grad, before) and torch.allclose(found, before)
    assert not native.in_order
    with pytest.raises(ZeroDivisionError), sums_in_order(batch_of([1])):
        1 / 0  # noqa: B018
    assert not native.in_order


def test_without_kernels_the_values_are_the_same(monkeypatch):
    x, dy, A, B = draw(N, 70), draw(N, 33, learns=False), draw(3, 70), draw(33, 3)

    def f(part, _):
        return lora_linear(part, None, A, B, ByMatrix(lambda dtype: torch.zeros(33, 70, dtype=dtype)), 1.7, None)

    want = in_parts(f, (3, 5), x, dy, (A, B))
    monkeypatch.setattr(native, "mode", "reference")
    for got, right in zip(in_parts(f, (3, 5), x, dy, (A, B)), want, strict=True):
        assert torch.allclose(got, right, atol=1e-4)
