"""Native kernels against float64 and plain PyTorch: values, every gradient, odd sizes, views, extremes, threads.

python -m pytest tests/ops/test_kernels.py
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from judging import equal_bits, in_both_modes, judge, needs_compiler, results

from minift.data.batch import token_keys
from minift.ops import compile, native, nf4
from minift.ops.dropout import Noise, dropout, mix_tensor
from minift.ops.gelu import gelu_erf, gelu_tanh
from minift.ops.linear import ByMatrix
from minift.ops.lora import lora_linear, shrink, spread
from minift.ops.loss import linear_cross_entropy
from minift.ops.norm import add_norm

ROOT = Path(__file__).parents[2]
needs_compiler(allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 2), (7, 63), (63, 7), (33, 768), (5, 1023), (3, 1500), (130, 17)]  # (N, C)
EPS = 1e-5


@pytest.fixture(autouse=True)
def native_mode(monkeypatch):
    monkeypatch.setattr(native, "mode", "native")
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setattr(native, "making", {})


def noise(n: int) -> Noise:
    """Dropout keys for n tokens."""
    return Noise(5, 6, token_keys(torch.arange(n), torch.zeros(n, dtype=torch.int64)))


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def dropping(p):
    """add_norm with this dropout rate."""

    def f(x, residual, weight, bias):
        return add_norm(x, residual, weight, bias, EPS, p, noise(len(x)), 3)

    return f


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("n,width", SIZES)
def test_add_norm(n, width, p, dtype):
    torch.manual_seed(n + width)
    x, residual, weight, bias = draw(n, width, dtype=dtype), draw(n, width, dtype=dtype), draw(width), draw(width)
    judge(dropping(p), [x, residual, weight, bias], [torch.randn(n, width) for _ in range(2)])


def test_a_norm_over_one_channel_is_the_bias():
    """1 / deviation is 316 there, and no gradient passes."""
    x, weight, bias = draw(5, 1), draw(1), draw(1)
    y = add_norm(x, x, weight, bias, EPS, 0.1, noise(5), 1)[1]
    assert torch.equal(y, bias.expand(5, 1)) and torch.autograd.grad(y.sum(), x)[0].abs().max() < 1e-4


@pytest.mark.parametrize("used", [0, 1])
def test_add_norm_where_one_result_is_used(used):
    """BERT goes on with y alone."""
    weight, bias = torch.randn(65), torch.randn(65)

    def f(x, residual):
        return add_norm(x, residual, weight.to(x.dtype), bias.to(x.dtype), EPS, 0.2, noise(9), 1)[used]

    judge(f, [draw(9, 65), draw(9, 65)], [torch.randn(9, 65)])


def test_frozen_weights_get_no_gradient():
    x, residual, weight, bias = draw(9, 65), draw(9, 65), torch.randn(65), torch.randn(65)
    judge(dropping(0.1), [x, residual, weight, bias], [torch.randn(9, 65) for _ in range(2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [gelu_erf, gelu_tanh])
@pytest.mark.parametrize("size", [1, 7, 63, 1023, 1500, 70000])
@pytest.mark.parametrize("scale", [0.1, 1, 4])
def test_gelu(f, size, scale, dtype):
    torch.manual_seed(size)
    judge(f, [draw(size, dtype=dtype, scale=scale)], [torch.randn(size)])


@pytest.mark.parametrize("f", [gelu_erf, gelu_tanh])
def test_gelu_keeps_the_digits_of_its_tail(f):
    """Where PyTorch's 1 + erf has lost them all."""
    x = torch.linspace(-9, -0.1, 5001)
    xd = x.double()
    u2 = (8 / torch.pi) ** 0.5 * (xd + 0.044715 * xd**3)
    want = xd * (torch.special.erfc(-xd / 2**0.5) / 2 if f is gelu_erf else torch.sigmoid(u2))
    assert ((f(x).double() - want) / want).abs().max() < 2e-5
    plain = F.gelu(x, approximate="none" if f is gelu_erf else "tanh").double()
    assert ((plain - want) / want).abs().max() > 0.1


@pytest.mark.parametrize("f", [gelu_erf, gelu_tanh])
def test_gelu_of_every_bfloat16(f):
    """All numbers that there are: value and slope are those of float32, rounded once."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].requires_grad_()
    floats = x.detach().float().requires_grad_()
    y, want = f(x), f(floats)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (slope,) = torch.autograd.grad(want.sum(), floats)
    for found, exact in ((y, want), (dx, slope)):
        unit = torch.finfo(torch.bfloat16).eps / 2
        assert found.dtype == torch.bfloat16
        assert ((found.float() - exact).abs() <= unit * exact.abs() * 1.001 + 1e-38).all()
    assert f(torch.tensor([torch.nan, torch.inf], dtype=torch.bfloat16)).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("n,width", SIZES)
def test_dropout_is_the_reference_to_the_bit(n, width, p, dtype):
    x, dout = draw(n, width, dtype=dtype), [torch.randn(n, width)]
    ours, want = in_both_modes(results, lambda x: dropout(x, p, noise(n), 2), [x], dout)
    assert equal_bits(ours, want)


def test_words_are_the_reference_to_the_bit():
    words = torch.arange(-70000, 70000, 3, dtype=torch.int32)
    ours, want = in_both_modes(mix_tensor, words)
    assert torch.equal(ours, want)


def test_the_norm_drops_what_dropout_drops():
    x = torch.ones(40, 100)
    h = add_norm(x, torch.zeros(40, 100), torch.ones(100), torch.zeros(100), EPS, 0.3, noise(40), 7)[0]
    assert torch.equal(h, dropout(x, 0.3, noise(40), 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("vocabulary", [2, 7, 63, 1500])
def test_loss(vocabulary, with_bias, smoothing, dtype):
    torch.manual_seed(vocabulary)
    rows, width = 37, 24
    targets = torch.randint(vocabulary, (rows,))
    inputs = [draw(rows, width, dtype=dtype), draw(vocabulary, width), *([draw(vocabulary)] if with_bias else [])]

    def f(x, weight, bias=None):
        return linear_cross_entropy(x, weight, bias, targets, smoothing)[0]

    logits = inputs[0].detach().float() @ inputs[1].detach().t()
    judge(f, inputs, [torch.ones(())], largest=logits.abs().max().item())


def test_hits_are_argmaxs_first():
    """Of equal logits the first is the answer, as with argmax."""
    x, targets = torch.eye(5), torch.tensor([0, 1, 2, 3, 4])
    weight = torch.tensor([[1.0, 1, 0, 0, 2], [1, 1, 0, 0, 2], [0, 0, 3, 0, 2], [0, 0, 0, 3, 2], [0, 0, 3, 0, 2]])

    def hits():
        rows = zip(x.split(1), targets.split(1), strict=True)
        return [linear_cross_entropy(row, weight, None, target)[1].item() for row, target in rows]

    assert in_both_modes(hits) == [[1, 0, 1, 1, 0]] * 2


@pytest.mark.parametrize("target", [-2, 63])
def test_a_target_outside_is_an_error(target):
    with pytest.raises(IndexError, match="expected 0 to 62, or -1"):
        linear_cross_entropy(draw(3, 5), draw(63, 5), None, torch.tensor([0, target, 5]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", ["x", "A", "x and A"])
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("n,width", SIZES)
def test_lora(n, width, rank, trained, dtype):
    torch.manual_seed(n + width)
    W, B = torch.randn(61, width).bfloat16(), torch.randn(61, rank)
    x, A = draw(n, width, dtype=dtype), draw(rank, width)
    for name, t in (("x", x), ("A", A)):
        t.requires_grad_(name in trained)

    def f(x, A):
        return lora_linear(x, None, A, B, ByMatrix(lambda dtype: W.to(dtype)), 2.0, noise(n).drop(0.2, 1, x.shape[1]))

    judge(f, [x, A], [torch.randn(n, 61)])


def test_lora_drops_what_dropout_drops():
    x, A = torch.randn(50, 130), torch.zeros(3, 130)
    A[0, 129], A[2, 5] = 1, 1
    drop = noise(50).drop(0.3, 4, 130)
    h = shrink(x, A, drop)
    want = dropout(x, 0.3, noise(50), 4)
    assert torch.equal(h[:, 0], want[:, 129]) and torch.equal(h[:, 2], want[:, 5]) and not h[:, 1].any()
    g, dx = torch.eye(3)[torch.arange(50) % 3], torch.zeros(50, 130)
    dA = spread(x, g, A, dx, drop)
    assert torch.equal(dx[0::3, 129] != 0, want[0::3, 129] != 0) and torch.equal(dx[2::3, 5] != 0, want[2::3, 5] != 0)
    assert torch.allclose(dA[1], want[1::3].sum(0), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 16384, 16385, 40000])
@pytest.mark.parametrize("kind", ["plain", "one element in", "inf and nan"])
def test_nf4_is_the_reference_to_the_bit(kind, n, dtype):
    torch.manual_seed(n)
    w = torch.randn(n + 1).to(dtype)
    w = w[1:] if kind == "one element in" else w[:n]
    if kind == "inf and nan":
        w[n // 2 : n // 2 + 1], w[n // 3 : n // 3 + 1], w[:1] = torch.nan, -torch.inf, torch.inf

    def there_and_back():
        codes, absmax = nf4.quantize(w[None])
        scales = [(absmax,), nf4.compress(absmax)] if n and absmax.isfinite().all() else [(absmax,)]
        outs = [nf4.dequantize(codes, a, torch.empty(n + 1, dtype=dtype)[1:], *more) for a, *more in scales]
        return [codes, *(t.nan_to_num(7.0) for t in (absmax, *outs))]

    ours, want = in_both_modes(there_and_back)
    assert equal_bits(ours, want)


KERNELS = sorted(path.stem for path in (ROOT / "kernels/cpu").glob("*.cpp"))


def operators() -> dict[str, Callable]:
    """The fused operators as functions of one matrix: OPERATORS in test_NAME.py, for every kernel NAME."""
    found = {}
    for name in KERNELS:
        file = Path(__file__).with_name(f"test_{name}.py")
        if file.exists() and "\nOPERATORS = " in file.read_text():
            found |= import_module(file.stem).OPERATORS
    return found


OPERATORS = operators()


def several(y: torch.Tensor | tuple) -> tuple:
    """The results of an operator that has one or more."""
    return y if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("view", ["one element in", "transposed", "every other", "expanded"])
def test_views(name, view):
    """A view gives what its copy gives, also as a gradient."""
    base = torch.randn(4000)
    x = {
        "one element in": lambda: base[1:1501].view(20, 75),
        "transposed": lambda: base[:1500].view(75, 20).t(),
        "every other": lambda: base[:3000].view(20, 150)[:, ::2],
        "expanded": lambda: base[:75].expand(20, 75),
    }[view]()
    found = []
    for v in (x, x.contiguous()):
        v = v.detach().requires_grad_()
        y = several(OPERATORS[name](v))
        found.append([*y, *torch.autograd.grad([t.sum() for t in y], v)])  # dy is expanded
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 1), (1, 1)])
def test_empty(name, shape):
    x = torch.randn(shape, requires_grad=True)
    several(OPERATORS[name](x))[0].sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(name, dtype):
    """Large values, subnormals and zeros as in float64; an inf or NaN shows in its row and nowhere else."""
    x = torch.randn(12, 75)
    x[0] *= 1e4
    x[1] = torch.where(x[1] > 0, 1e4, -1e4)
    x[2] *= 1e-39
    x[3] = 0
    x[4] = 1e4
    x = x.to(dtype)
    found = []
    for v in (x, x.double()):
        v = v.clone().requires_grad_()
        y = several(OPERATORS[name](v))
        found.append([*y, *torch.autograd.grad(y[-1].sum(), v)])
    for a, e in zip(*found, strict=True):
        size = e.abs().amax(-1, keepdim=True) if name == "lora" else e.abs()  # h is rounded, and all channels have it
        tolerance = (2e-5 if dtype == torch.float32 else 2e-2) * size.clamp_min(1)
        assert ((a - e).abs() <= tolerance).all()
    for bad in (torch.inf, -torch.inf, torch.nan):
        v = x.clone()
        v[5, 3] = bad
        for t in several(OPERATORS[name](v)):
            rows = t.isfinite().view(-1, t.shape[-1] if t.dim() else 1).all(1)
            assert not rows[5 if t.dim() else 0] and rows.sum() == len(rows) - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    """Of minift's own kernels. What torch's BLAS sums by thread (LoRA's dy B and dy^T h at rank 1) is not theirs."""
    torch.manual_seed(0)
    before, runs = torch.get_num_threads(), []
    x, weight, bias, g = draw(611, 333, dtype=dtype), draw(333), draw(333), torch.randn(611, 1).to(dtype)
    A, some = torch.randn(1, 333), noise(611)
    drop = some.drop(0.1, 1, 333)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = [add_norm(x, x, weight, bias, EPS, 0.1, some, 1)[1], gelu_erf(x), gelu_tanh(x)]
            out += [dropout(x, 0.1, some, 1)]
            codes, absmax = nf4.quantize(x.detach())
            out += [codes, absmax, nf4.dequantize(codes, absmax, torch.empty(611, 333, dtype=dtype))]
            gradients = [
                torch.autograd.grad(y.sum(), [x, weight, bias], allow_unused=True) for y in out if y.requires_grad
            ]
            dx = torch.zeros_like(x)
            lora = [shrink(x.detach(), A, drop), spread(x.detach(), g, A, dx, drop), dx]
            runs.append(out + lora + [g for gs in gradients for g in gs if g is not None])
    finally:
        torch.set_num_threads(before)
    assert equal_bits(runs[0], runs[1]) and equal_bits(runs[0], runs[2])


def test_nothing_is_saved_that_can_be_made_again():
    def saved(f):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            f()
        return sorted(sizes)

    x, weight, bias = draw(50, 300), draw(300), draw(300)
    assert saved(lambda: gelu_tanh(x)) == [15000]
    assert saved(lambda: add_norm(x, x, weight, bias, EPS, 0.1, noise(50), 1)) == [50, 50, 50, 300, 300, 15000]


def test_a_second_derivative_is_refused():
    x = draw(4, 8)
    (g,) = torch.autograd.grad(gelu_erf(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        g.sum().backward()
    (g,) = torch.autograd.grad(gelu_erf(x), x, draw(4, 8), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Odd sizes, views, extremes and int8 once more, in a process with the address and undefined-behaviour checks."""
    compiler = compile.compiler()[0]
    found = [subprocess.run([*compiler, f"-print-file-name=lib{n}.so"], capture_output=True, text=True).stdout.strip()
             for n in ("asan", "ubsan")]  # fmt: skip
    if not all(os.path.isabs(f) for f in found):
        pytest.skip(f"{compiler[0]} has no sanitizer libraries")
    code = (
        "import sys, pytest; from minift.ops import compile;"
        "compile.FLAGS += ' -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all';"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/ops/test_kernels.py',"
        " 'tests/ops/test_int8.py', 'tests/ops/test_in_order.py', '-k', sys.argv[1]]))"
    )
    preload = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    chosen = "views or empty or extremes or threads or hits or dropout or tail or lora_drops or nf4"
    chosen += " or equations or infinities or sums_are_exact or in_order"
    done = subprocess.run(
        [sys.executable, "-c", code, chosen],
        cwd=ROOT, env=os.environ | preload, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = {path.name.partition("-")[0] for path in tmp_path.glob("minift/kernels/*.so")}
    assert made >= set(KERNELS) - {"memory", "attention"}  # no operator; test_attention_native.py has a program for it
