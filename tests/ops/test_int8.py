"""Products with a matrix in int8: against their equations in float64, row by row, with outliers; kernel and reference.

python -m pytest tests/ops/test_int8.py
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minift.ops import int8, native
from minift.ops.linear import frozen_linear


@contextmanager
def in_mode(mode):
    """Operators by their kernels (native) or by PyTorch (reference)."""
    before = native.mode
    native.mode = mode
    try:
        yield
    finally:
        native.mode = before


SIZES = [(1, 1, 1), (5, 15, 3), (7, 16, 300), (33, 70, 41), (64, 768, 257), (0, 40, 8)]
DTYPES = [torch.float32, torch.bfloat16]


def made(n, channels, outputs, dtype=torch.float32, seed=0):
    """(x (n, channels), products with a matrix (outputs, channels), that matrix)."""
    torch.manual_seed(seed)
    matrix = torch.randn(outputs, channels) * torch.rand(outputs, 1)
    return torch.randn(n, channels).to(dtype), int8.Products(*int8.quantize(matrix)), matrix


def exact(rows: int8.Rows, codes, absmax, is_back: bool):
    """The product by the equations, in float64, from what was quantised."""
    x = rows.codes.double() * (rows.absmax.double() / 127)[:, None]
    for n, count in enumerate(rows.counts.tolist()):
        columns = rows.columns[n, :count].long()
        x[n, columns] += rows.values[n, :count].double()
    if is_back:
        return x @ codes.double()
    return x @ codes.double().t() * (absmax.double() / 127)


def off(found, want) -> float:
    """The error, as norms."""
    return ((found.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("mode", ["native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_those_of_the_equations(size, dtype, mode):
    n, channels, outputs = size
    x, products, _ = made(*size, dtype)
    bias = torch.randn(outputs)
    dy = torch.randn(n, outputs).to(dtype)
    with in_mode(mode):
        y = products.times(x, bias)
        dx = products.times_transposed(dy)
        rows = int8.quantize_rows(x, None)
        back = int8.quantize_rows(dy, products.absmax / 127)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    want = exact(rows, products.codes, products.absmax, False) + bias.double()
    assert torch.allclose(y.double(), want, rtol=unit, atol=unit * (1 + want.abs().max().item() if n else 1))
    want = exact(back, products.codes, products.absmax, True)
    assert torch.allclose(dx.double(), want, rtol=unit, atol=unit * (want.abs().max().item() if n else 1))


def test_errors_are_those_of_eight_bits():
    """Against the matrix and the numbers before they were quantised: some thousandths, as uniform noise has."""
    x, products, matrix = made(200, 768, 512)
    assert off(products.times(x, None), x.double() @ matrix.double().t()) < 0.015
    dy = torch.randn(200, 512)
    assert off(products.times_transposed(dy), dy.double() @ matrix.double()) < 0.02


@pytest.mark.parametrize("mode", ["native", "reference"])
def test_outliers_cost_nothing(mode):
    """A channel times 100 in all rows, another in one: the others keep their digits."""
    x, products, matrix = made(100, 768, 300)
    plain = products.times(x, None).double() - x.double() @ matrix.double().t()
    wild = x.clone()
    wild[:, 5] *= 100
    wild[7, 300] = 1000.0
    weights = int8.dequantize(products.codes, products.absmax, torch.float64)
    with in_mode(mode):
        found = products.times(wild, None).double()
        rows = int8.quantize_rows(wild, None)
    apart = wild.double() @ weights.t()  # with this the error of the weights is not counted, which outliers scale
    assert (found - apart).norm() < 1.3 * plain.norm()
    assert rows.counts.sum() > 90 and rows.counts[7] == 2 and rows.columns[7, :2].tolist() == [5, 300]

    # and without: what would be lost
    naive = wild * (127 / wild.abs().amax(1, keepdim=True))
    naive = naive.round() * (wild.abs().amax(1, keepdim=True) / 127)
    assert (naive.double() @ weights.t() - apart).norm() > 5 * (found - apart).norm()


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 3), st.sampled_from(DTYPES), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_kernel_and_reference_quantise_alike(n, channels, wild, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, channels)
    for _ in range(wild):
        x[torch.randint(n, ()), torch.randint(channels, ())] *= 1000
    x = x.to(dtype)
    factors = torch.rand(channels) if seed % 2 else None
    with in_mode("native"):
        ours = int8.quantize_rows(x, factors)
    with in_mode("reference"):
        plain = int8.quantize_rows(x, factors)
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.absmax, plain.absmax)
    assert torch.equal(ours.counts, plain.counts)
    kept = int8.in_use(plain)
    assert torch.equal(ours.columns[kept], plain.columns[kept]) and torch.equal(ours.values[kept], plain.values[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_any_batch_and_with_any_threads(dtype):
    """To the bit, with outliers in other rows too: sums of products of codes are exact."""
    x, products, _ = made(90, 200, 130, dtype)
    x[40] *= 50
    x[41, 3] = 300
    dy = torch.randn(90, 130).to(dtype)
    whole, back = products.times(x, None), products.times_transposed(dy)
    threads = torch.get_num_threads()
    for part in (slice(0, 1), slice(38, 45), slice(41, 90)):
        assert torch.equal(products.times(x[part], None), whole[part])
        assert torch.equal(products.times_transposed(dy[part]), back[part])
    try:
        torch.set_num_threads(1)
        assert torch.equal(products.times(x, None), whole) and torch.equal(products.times_transposed(dy), back)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [(3, 5, 7), (300, 3072, 70), (64, 1025, 64), (99, 512, 130), (1, 1, 1)], ids=str)
def test_sums_are_exact_however_they_are_made(size, monkeypatch):
    """Also the largest there are, which 16 bits do not hold and float32 does not either."""
    n, channels, outputs = size
    x = torch.randint(-127, 128, (n, channels), dtype=torch.int8)
    w = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8)
    x[0], w[0], x[-1], w[-1] = 127, 127, -127, -127
    exact = (x.double() @ w.double().t()).int()
    part = (x[:, ::2].double() @ w[:, ::2].double().t()).int()
    assert torch.equal(int8.multiply(x, w.t()), exact)
    assert torch.equal(int8.multiply(x, w.t().contiguous()), exact)
    monkeypatch.setattr(int8, "has_int_mm", lambda: False)  # as on a CPU without VNNI
    for mode in ("native", "reference"):
        with in_mode(mode):
            assert torch.equal(int8.multiply(x, w.t()), exact)
            assert torch.equal(int8.multiply(x, w.t().contiguous()), exact)
            assert torch.equal(int8.multiply(x[:, ::2], w[:, ::2].t()), part)  # views


@pytest.mark.parametrize("mode", ["native", "reference"])
def test_infinities_and_nan_show_and_zeros_are_zero(mode):
    x, products, _ = made(6, 40, 9)
    x[1, 3], x[2, 4], x[3] = torch.inf, torch.nan, 0
    with in_mode(mode):
        y = products.times(x, None)
        none = int8.Products(*int8.quantize(torch.zeros(9, 40))).times(x[4:], None)
    assert y[1:3].isnan().all() and y[[0, 3, 4, 5]].isfinite().all()
    assert not y[3].any() and not none.any()


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    matrix = torch.randn(70, 130).half()
    codes, absmax = int8.quantize(matrix)
    theirs, stats, _ = functional.int8_vectorwise_quant(matrix)
    assert torch.equal(absmax, stats.float()) and (codes.int() - theirs.int()).abs().max() <= 1
    assert (codes != theirs).float().mean() < 0.01  # where they round in float16


def test_the_gradient_of_a_frozen_layer():
    x, products, matrix = made(30, 64, 50)
    x.requires_grad_()
    bias = torch.randn(50, requires_grad=True)
    y = frozen_linear(x, bias, products)
    assert y.grad_fn.saved_tensors == ()
    dy = torch.randn_like(y)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert off(dx, dy.double() @ matrix.double()) < 0.02 and torch.allclose(dbias, dy.sum(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("n", [1, 7, 64])
def test_cuda_computes_the_same(n):
    x, products, _ = made(n, 64, 128)
    x[0, 3] = 500.0
    moved = int8.Products(products.codes.cuda(), products.absmax.cuda())
    dy = torch.randn(n, 128)
    assert torch.allclose(moved.times(x.cuda(), None).cpu(), products.times(x, None), rtol=1e-5, atol=1e-4)
    assert torch.allclose(moved.times_transposed(dy.cuda()).cpu(), products.times_transposed(dy), rtol=1e-5, atol=1e-4)
