"""NF4 against bitsandbytes on the CPU: every byte. And what an operator over it saves.

python -m pytest tests/ops/test_nf4.py
"""

import hashlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judging import needs_compiler

from minift.ops import native, nf4
from minift.ops.linear import ByMatrix, frozen_linear

bnb = pytest.importorskip("bitsandbytes.functional")
CPU = torch.device("cpu")
SHAPES = [(64, 64), (192, 64), (7, 9), (1, 1), (3, 5), (100, 33), (513, 1000), (1, 65)]


# bitsandbytes' second table comes of torch.linspace, which rounds otherwise on a CPU without fused multiply-add
PUBLISHED = torch.equal(bnb.create_dynamic_map(), nf4.dynamic_levels(CPU))


def digest(t: torch.Tensor) -> str:
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()


@pytest.fixture(autouse=True, params=["reference", "native"])
def kernels(request, monkeypatch):
    """Everything twice: by PyTorch, and by the kernel in C++."""
    if request.param == "native":
        needs_compiler()
    monkeypatch.setattr(native, "mode", request.param)


@pytest.fixture(autouse=True)
def no_compilation():
    """bitsandbytes compiles some functions for every shape anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def as_rounded(codes: torch.Tensor, scales: list, want: torch.Tensor) -> bool:
    """Whether the numbers are `want`. Of two that are as near, a bitsandbytes built for CUDA may take the other."""
    exact = nf4.dequantize(codes, scales[0], torch.empty_like(want, dtype=torch.float32), *scales[1:])
    found = nf4.dequantize(codes, scales[0], torch.empty_like(want), *scales[1:])
    tie = (found - exact).abs() == (want - exact).abs()
    return torch.equal(found, exact.to(want.dtype)) and bool(((found == want) | tie).all())


def check(w: torch.Tensor) -> None:
    """Codes, scales, scales of scales and the numbers they stand for are those of bitsandbytes, bit for bit.

    As one row: see test_bitsandbytes_misreads_some_widths.
    """
    two_dimensional, w = nf4.quantize(w), w.reshape(1, -1)
    assert all(torch.equal(a, b) for a, b in zip(two_dimensional, nf4.quantize(w), strict=True))
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    codes, absmax = nf4.quantize(w)
    assert torch.equal(codes, theirs) and torch.equal(absmax, state.absmax)
    want = bnb.dequantize_4bit(theirs, state).reshape(1, -1)  # it turns what has one byte
    assert as_rounded(codes, [absmax], want)
    if not PUBLISHED:
        return
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    d, nested, mean = nf4.compress(absmax)
    assert torch.equal(mean, state.offset) and torch.equal(nested, state.state2.absmax) and torch.equal(d, state.absmax)
    want = bnb.dequantize_4bit(theirs, state).reshape(1, -1)
    for scales in ([nf4.expand(d, nested, mean)], [d, nested, mean]):
        assert as_rounded(codes, scales, want)


def test_the_two_tables_are_the_published_ones():
    assert digest(nf4.levels(CPU)) == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"
    assert digest(nf4.dynamic_levels(CPU)) == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_bitsandbytes(shape, dtype):
    check(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["zeros", "ones", "a block of zeros", "midpoints", "tiny", "one large"])
def test_hard_cases(name, dtype):
    w = torch.randn(128, 96, generator=torch.Generator().manual_seed(1))
    if name in ("zeros", "ones"):
        w.fill_(float(name == "ones"))
    elif name == "a block of zeros":
        w.view(-1)[64:128] = 0
    elif name == "midpoints":
        levels = nf4.levels(CPU)
        w.view(-1, 64)[:] = torch.cat([(levels[:-1] + levels[1:]) / 2, levels, torch.ones(33)])
    elif name == "tiny":
        w *= 1e-39 if dtype == torch.float32 else 1e-36  # the peer's bf16 drops subnormal numbers
    else:
        w[5, 5] = 1e4
    check(w.to(dtype))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**20), st.floats(1e-6, 1e6))
def test_any_matrix(rows, columns, seed, scale):
    check(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale)


def test_many_scales_are_compressed_alike():
    """bitsandbytes rounds to a grid before it looks for the nearest level; near a midpoint that shows."""
    for seed in range(3):
        a = torch.rand(200_000, generator=torch.Generator().manual_seed(seed)) + 0.1
        theirs, state = bnb.quantize_blockwise(a - a.mean(), blocksize=256)
        d, nested, _ = nf4.compress(a)
        assert torch.equal(d, theirs) and torch.equal(nested, state.absmax)


def test_bitsandbytes_misreads_some_widths():
    """Its code for AVX-512 begins a block in every row, and so misreads blocks that go on in the next one (even widths
    that are no multiple of 64). On other CPUs it is right. The bytes are right everywhere; numbers are compared in one
    row for that reason.
    """
    w = torch.randn(128, 96, generator=torch.Generator().manual_seed(1))
    theirs, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    codes, absmax = nf4.quantize(w)
    assert torch.equal(codes, theirs)
    assert (nf4.dequantize(codes, absmax, torch.empty_like(w)) - w).abs().mean() < 0.075
    error = (bnb.dequantize_4bit(theirs, state) - w).abs().mean()
    assert error < 0.075 or error > 0.15


def test_the_published_error_and_size():
    """Mean absolute error on N(0, 1) 0.0728 (QLoRA's table of data types); 4.127 bits a weight."""
    w = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    codes, absmax = nf4.quantize(w)
    assert (nf4.dequantize(codes, absmax, torch.empty_like(w)) - w).abs().mean().item() == pytest.approx(
        0.0728, abs=5e-5
    )
    bits = 8 * sum(t.nbytes for t in (codes, *nf4.compress(absmax))) / w.numel()
    assert bits == pytest.approx(4.127, abs=1e-3)


def test_work_in_chunks_changes_nothing(monkeypatch):
    w = torch.randn(150, 70, generator=torch.Generator().manual_seed(2))
    want = nf4.quantize(w)
    for got, expected in zip(nf4.quantize(w.t().contiguous().t()), want, strict=True):  # another layout
        assert torch.equal(got, expected)
    monkeypatch.setattr(nf4, "CHUNK", 256)
    for got, expected in zip(nf4.quantize(w), want, strict=True):
        assert torch.equal(got, expected)
    small = nf4.dequantize(*want, torch.empty_like(w))
    monkeypatch.undo()
    assert torch.equal(small, nf4.dequantize(*want, torch.empty_like(w)))


def test_the_frozen_product_saves_nothing():
    w = torch.randn(5, 7, dtype=torch.float64)
    x, bias = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen_linear(x, bias.requires_grad_(), ByMatrix(lambda dtype: w.to(dtype)))
    assert saved == [] and torch.equal(y, x @ w.t() + bias)
    dx, db = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert torch.allclose(dx, torch.ones_like(y) @ w) and torch.allclose(db, torch.full_like(bias, 4))


def test_scratch_is_one_piece_of_memory():
    a = nf4.scratch(4, 8, torch.float32, CPU)
    assert nf4.scratch(2, 3, torch.float32, CPU).data_ptr() == a.data_ptr()
    with torch.inference_mode():
        big = nf4.scratch(1000, 1000, torch.float16, CPU)
    assert not big.is_inference() and big.shape == (1000, 1000)
