"""Linear + cross-entropy against the plain formula: loss, hits, every gradient, chunk by chunk.

python -m pytest tests/ops/test_loss.py
"""

import pytest
import torch
import torch.nn.functional as F

from minift.ops import loss as module
from minift.ops import native
from minift.ops.loss import linear_cross_entropy

# for test_kernels.py: functions of one matrix
OPERATORS = {
    "loss": lambda x: linear_cross_entropy(x, torch.eye(x.shape[1]), None, torch.arange(len(x)) % x.shape[1], 0.1)[0]
}


def inputs(rows=23, width=7, vocabulary=63, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    x = (scale * torch.randn(rows, width)).to(dtype).requires_grad_()
    weight, bias = torch.randn(vocabulary, width, requires_grad=True), torch.randn(vocabulary, requires_grad=True)
    return x, weight, bias, torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("chunk", [1 << 22, 200, 1], ids=["one chunk", "three rows", "a row"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_loss_and_gradients(chunk, with_bias, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    x, weight, bias, targets = inputs()
    parts = (x, weight, bias) if with_bias else (x, weight)
    loss, correct = linear_cross_entropy(x, weight, bias if with_bias else None, targets)
    exact = [t.detach().double().requires_grad_() for t in parts]
    z = F.linear(*exact)
    want = F.cross_entropy(z, targets, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert correct.item() == (z.argmax(-1) == targets).sum().item() and not correct.requires_grad
    for a, b in zip(torch.autograd.grad(loss / 23, parts), torch.autograd.grad(want / 23, exact), strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1, b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_classes_that_are_added_change_nothing(with_bias, dtype, monkeypatch):
    """As on CUDA, where they make products faster."""
    x, weight, bias, targets = inputs(dtype=dtype)
    targets[3] = -1
    found = []
    for more in (0, 7):
        monkeypatch.setattr(module, "classes_to_add", lambda x, V, more=more: more)
        parts = (x, weight, bias) if with_bias else (x, weight)
        loss, correct = linear_cross_entropy(x, weight, bias if with_bias else None, targets, 0.1)
        found.append([loss, correct, *torch.autograd.grad(loss, parts)])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and torch.allclose(
            a.double(), b.double(), rtol=1e-5, atol=1e-6 * b.abs().max().item()
        )


def test_only_the_gradients_asked_for_are_made():
    x, weight, bias, targets = inputs()
    loss, _ = linear_cross_entropy(x, weight.detach(), bias.detach(), targets)
    loss.backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, bias, targets)[0].item() == pytest.approx(loss.item())


def test_bfloat16_activations_have_a_float32_loss_and_float32_weight_gradients():
    x, weight, bias, targets = inputs(dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(x, weight, bias, targets)
    loss.backward()
    assert (loss.dtype, x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    want = F.cross_entropy(F.linear(x.double(), weight.double(), bias.double()), targets, reduction="sum")
    assert loss.item() == pytest.approx(want.item(), rel=2e-2)


def test_extreme_logits():
    x, weight, bias, targets = inputs(scale=1e4)
    loss, _ = linear_cross_entropy(x, weight, bias, targets)
    assert loss.item() == pytest.approx(
        F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum").item(), rel=1e-6
    )
    x.data[0, 0] = torch.inf
    assert not linear_cross_entropy(x, weight, bias, targets)[0].isfinite()


def test_no_rows():
    x, weight, bias, targets = inputs(rows=0)
    loss, correct = linear_cross_entropy(x, weight, bias, targets)
    loss.backward()
    assert loss.item() == 0 and correct.item() == 0 and weight.grad.abs().sum() == 0


def test_nothing_of_size_rows_times_vocabulary_is_saved():
    x, weight, bias, targets = inputs(rows=500, vocabulary=400)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        loss, _ = linear_cross_entropy(x, weight, bias, targets)
    assert sizes == [] and [g.shape for g in loss.grad_fn.gradients] == [x.shape, weight.shape, bias.shape]


def test_gradients_are_handed_over_without_a_copy():
    x, weight, bias, targets = inputs()
    loss, _ = linear_cross_entropy(x, weight, bias, targets)
    kept = [g.data_ptr() for g in loss.grad_fn.gradients]
    (loss / 23).backward()
    assert kept == [t.grad.data_ptr() for t in (x, weight, bias)]


def test_a_second_backward_is_refused():
    """They were scaled in place: a second time would give wrong numbers."""
    x, weight, bias, targets = inputs()
    loss, _ = linear_cross_entropy(x, weight, bias, targets)
    (loss / 23).backward(retain_graph=True)
    before = [t.grad.clone() for t in (x, weight, bias)]
    with pytest.raises(RuntimeError, match="compute it again"):
        (loss / 23).backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(before, (x, weight, bias), strict=True))


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing(smoothing):
    x, weight, bias, targets = inputs()
    loss, _ = linear_cross_entropy(x, weight, bias, targets, smoothing)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    want = F.cross_entropy(F.linear(*exact), targets, reduction="sum", label_smoothing=smoothing)
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    ours, theirs = torch.autograd.grad(loss, (x, weight, bias)), torch.autograd.grad(want, exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 2e-6 * max(1, b.abs().max())


@pytest.mark.parametrize("mode", ["native", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_that_are_not_asked_about_change_nothing(mode, smoothing, monkeypatch):
    monkeypatch.setattr(native, "mode", mode)
    x, weight, bias, targets = inputs()
    asked = torch.arange(len(targets)) % 3 != 1
    some = x.detach()[asked].requires_grad_()
    want, right = linear_cross_entropy(some, weight, bias, targets[asked], smoothing)
    expected = torch.autograd.grad(want, (some, weight, bias))
    loss, correct = linear_cross_entropy(x, weight, bias, targets.masked_fill(~asked, -1), smoothing)
    dx, *found = torch.autograd.grad(loss, (x, weight, bias))
    assert loss.item() == pytest.approx(want.item(), rel=1e-6) and correct.item() == right.item()
    assert not dx[~asked].any()
    for a, b in zip((dx[asked], *found), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
