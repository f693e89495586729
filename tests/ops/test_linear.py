"""Products by oneDNN, on any CPU that has it: as exact as torch's own, forward and every gradient.

python -m pytest tests/ops/test_linear.py
"""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from judging import greatest, root_mean_square

from minift.ops import linear as ops
from minift.ops import native

there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not there, reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(ops, "is_faster", lambda: True)
    monkeypatch.setattr(ops, "is_faster_turned", lambda: True)
    monkeypatch.setattr(ops, "is_faster_for_weights", lambda: True)
    monkeypatch.setattr(native, "mode", "auto")
    monkeypatch.setattr(ops, "LEAST", 1)


def results(f, x, w, bias, dtype=torch.float32):
    """y and the gradients of everything that has one."""
    leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, w, bias) if t is not None]
    y = f(*leaves, *([None] if bias is None else []))
    dy = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y).sin()
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], dy)]


def check_beside(mine: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """The root mean square error is at most twice torch's, and a share of the largest number."""
    allowed = 2 * root_mean_square(theirs - exact) + 1e-7 * greatest(exact)
    assert root_mean_square(mine - exact) <= allowed


@pytest.mark.parametrize("rows", [1, 7, 63, 1023, 1500])
@pytest.mark.parametrize("width, out", [(768, 64), (65, 129), (1, 3), (384, 1536)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_error_beside_torchs(rows, width, out, has_bias):
    torch.manual_seed(rows)
    x, w = torch.randn(rows, width, requires_grad=True), torch.randn(out, width, requires_grad=True)
    bias = torch.randn(out, requires_grad=True) if has_bias else None
    exact = results(F.linear, x, w, bias, torch.float64)
    for mine, theirs, e in zip(results(ops.linear, x, w, bias), results(F.linear, x, w, bias), exact, strict=True):
        check_beside(mine, theirs, e)


@pytest.mark.parametrize("x_learns, w_learns", [(True, False), (False, True)])
def test_only_what_is_asked_for(x_learns, w_learns):
    x, w = torch.randn(5, 40, requires_grad=x_learns), torch.randn(30, 40, requires_grad=w_learns)
    for a, b in zip(results(ops.linear, x, w, None), results(F.linear, x, w, None), strict=True):
        torch.testing.assert_close(a, b)
    y = ops.linear(x, w, None)
    assert (y.grad_fn.saved_tensors[0] is None) == (not w_learns)


def test_strides_and_places():
    memory = torch.randn(3 * 41 * 50 + 1)[1:]  # not aligned
    x, w = memory[: 41 * 50].view(41, 50), memory[41 * 50 : 82 * 50].view(50, 41)
    assert torch.allclose(ops.product(x, w.t()), x @ w, atol=1e-5)  # a transposed matrix
    assert torch.allclose(ops.product(x.t(), w), x.t() @ w.t(), atol=1e-5)
    assert torch.allclose(ops.product(x[:, 3:20], w.t()[:30, 3:20]), x[:, 3:20] @ w.t()[:30, 3:20].t(), atol=1e-5)


def test_infinities_show_and_threads_hardly():
    """A BLAS may sum in another order with other threads: by a few roundings of sums of 300 and 900 numbers."""
    x, w, dy = torch.randn(900, 300), torch.randn(200, 300), torch.randn(900, 200)
    before, threads = [ops.product(x, w), ops.weight_gradient(dy, x)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        after = [ops.product(x, w), ops.weight_gradient(dy, x)]
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * a.abs().max().item())
    finally:
        torch.set_num_threads(threads)
    x[3, 5] = torch.inf
    y, dw = ops.product(x, w), ops.weight_gradient(dy, x)
    assert not y[3].isfinite().any() and y[4:].isfinite().all()
    assert not dw[:, 5].isfinite().any() and dw[:, 6:].isfinite().all()


@pytest.mark.parametrize("rows, out", [(1, 70), (704, 3072), (1500, 3073), (33, 9000)])
@pytest.mark.parametrize("grows", [False, True])
def test_weight_gradients_in_pieces(rows, out, grows):
    """More rows than a piece has, more outputs, both; on top of another gradient, in its memory."""
    torch.manual_seed(rows)
    x, dy, onto = torch.randn(rows, 40), torch.randn(rows, out), torch.randn(out, 40) if grows else None
    exact = dy.double().t() @ x.double() + (0 if onto is None else onto.double())
    theirs = dy.t() @ x + (0 if onto is None else onto)
    mine = ops.weight_gradient(dy, x, onto)
    assert onto is None or mine.data_ptr() == onto.data_ptr()
    assert mine.is_contiguous()
    check_beside(mine, theirs, exact)


def test_what_is_left_to_torch(monkeypatch):
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    assert ops.takes(x, w, 64)
    assert not ops.takes(x.double(), w.double(), 64) and not ops.takes(x.bfloat16(), w.bfloat16(), 64)
    assert not ops.takes(x[:0], w, 64) and ops.product(x[:0], w).shape == (0, 8)
    assert torch.equal(ops.weight_gradient(x[:0], x[:0]), torch.zeros(8, 8))
    monkeypatch.setattr(native, "mode", "reference")
    assert not ops.takes(x, w, 64)
    monkeypatch.setattr(torch, "ops", None)  # a torch without oneDNN
    assert torch.equal(ops.weight_gradient(x, x), x.t() @ x) and torch.equal(ops.product(x, w), x @ w.t())


# ---- bfloat16 on a CPU without instructions for it


@pytest.fixture
def plain_cpu(monkeypatch):
    """A CPU that does not multiply bfloat16, and parts that are small enough for there to be several."""
    monkeypatch.setattr(ops, "cpu_bfloat16", lambda: "")
    monkeypatch.setattr(ops, "AS_FLOATS", 1000)


@pytest.mark.parametrize("rows", [0, 1, 7, 250])
@pytest.mark.parametrize("width, out", [(768, 64), (65, 129), (1, 3), (40, 1001)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bfloat16_by_floats(rows, width, out, has_bias, plain_cpu):
    """y and dx are the exact sums, rounded once, and dW is not rounded: W is float32 where it learns."""
    torch.manual_seed(rows)
    x, w = torch.randn(rows, width).bfloat16().requires_grad_(), torch.randn(out, width, requires_grad=True)
    bias = torch.randn(out, requires_grad=True) if has_bias else None
    y = ops.linear(x, w, bias)
    dy = torch.randn(rows, out).bfloat16()
    y.backward(dy)
    x, rounded = x.double(), w.bfloat16().double()
    exact_y = x @ rounded.t() + (bias.bfloat16().double() if has_bias else 0)
    exact_dw = dy.double().t() @ x
    torch.testing.assert_close(y, exact_y.bfloat16(), rtol=0.008, atol=1e-4)  # a last place, where sums lie between two
    torch.testing.assert_close(w.grad, exact_dw.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [0, 1, 768, 3072, 4096])
@pytest.mark.parametrize("rows", [0, 1, 63, 768, 2304, 3072, 50_257])
def test_parts_that_are_float32_at_once_are_even_and_about_a_million_numbers(rows, width):
    n = ops.at_once(rows, width)
    assert n > 0 and n % ops.EVEN == 0
    if rows * width <= 1.5 * ops.AS_FLOATS:
        assert n >= rows
    else:
        assert 0.5 * ops.AS_FLOATS < n * width < 1.5 * ops.AS_FLOATS + ops.EVEN * width


def test_bfloat16_by_floats_in_every_way(plain_cpu, monkeypatch):
    """dx by a matrix that lies by columns, with a bias too; a gradient on top of another; narrow matrices; and only
    there: not where the CPU multiplies them, nor with --kernels reference."""
    x, dy, w = torch.randn(30, 50).bfloat16(), torch.randn(30, 70).bfloat16(), torch.randn(70, 50).bfloat16()
    bias, onto = torch.randn(50).bfloat16(), torch.randn(70, 50)
    want = dy.double() @ w.double() + bias.double()
    torch.testing.assert_close(ops.product(dy, w.t(), bias), want.bfloat16(), rtol=0.008, atol=1e-4)
    torch.testing.assert_close(ops.matmul(x, w.t()), (x.double() @ w.double().t()).bfloat16(), rtol=0.008, atol=1e-4)
    want = onto.double() + dy.double().t() @ x.double()
    assert ops.weight_gradient(dy, x, onto, torch.float32) is onto
    torch.testing.assert_close(onto, want.float())
    assert ops.weight_gradient(dy, x).dtype == torch.bfloat16
    assert ops.goes_by_floats(x) and not ops.goes_by_floats(x.float())
    assert ops.goes_by_floats(x.to("meta")) != torch.cuda.is_available()  # which a plan on that device is then for
    monkeypatch.setattr(native, "mode", "reference")
    assert not ops.goes_by_floats(x)
    monkeypatch.setattr(native, "mode", "auto")
    monkeypatch.setattr(ops, "cpu_bfloat16", lambda: "AMX")
    assert not ops.goes_by_floats(x)


GROWTH = """
import sys, ctypes, torch
from minift.ops import linear, native
if sys.argv[1] == "bounded": linear.keep_few_products()
linear.is_faster = linear.is_faster_turned = lambda: True
linear.LEAST = 1

def used():
    torch.ones(1)
    libc = ctypes.CDLL(None)
    class Info(ctypes.Structure):
        _fields_ = [(n, ctypes.c_size_t) for n in "arena o s hblks mapped us fs used free top".split()]
    libc.mallinfo2.restype = Info
    info = libc.mallinfo2()
    return info.used + info.mapped

x, ws = torch.randn(400, 256), [torch.randn(n, 256) for n in (256, 512, 768)]
found = []
for rows in range(100, 260):
    for w in ws:
        linear.product(x[:rows], w)
        linear.product(x[:rows].bfloat16(), w.bfloat16())
    found.append(used())
print((found[-1] - found[39]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64",
    reason="asks glibc; other CPUs have no such code",
)
def test_new_numbers_of_tokens_take_no_memory():
    """Megabytes that 120 further batches of other sizes leave behind: none; 10 to 40 where the caches are unbounded."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    bounded, unbounded = (
        float(
            subprocess.run(
                [sys.executable, "-c", GROWTH, how], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("bounded", "not")
    )
    assert bounded < 3 < 2 * bounded + 3 < unbounded
