"""CUDA kernels: they compile, have the CPU's interface, and are right, emulated and on a device where there is one.

python -m pytest tests/ops/test_cuda.py

To compile them needs NVRTC (in torch's CUDA wheels; else `pip install nvidia-cuda-nvrtc`) or nvcc. Emulated (emulate.h)
they run as C++, thread by thread, below the same autograd functions as on a device; only speed is left to see there.
"""

import ctypes
import re
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from judging import equal_bits, in_both_modes, in_mode, judge, needs_compiler, results

from minift.data.batch import token_keys
from minift.ops import compile, cuda, flash, native, nf4, sources
from minift.ops.attention import Settings, attention
from minift.ops.dropout import Drop, Noise, dropout, for_kernels, mix_tensor
from minift.ops.gelu import Gelu, gelu_tanh
from minift.ops.linear import ByMatrix
from minift.ops.lora import lora_linear, shrink, spread
from minift.ops.loss import cross_entropy, linear_cross_entropy
from minift.ops.norm import add_norm

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "kernels/cuda").glob("*.cu"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = torch.device("cuda", 0)
EPS = 1e-5

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def texts(name: str) -> dict[str, str]:
    """kernels/cuda/NAME.cu with its headers."""
    return sources.read_sources(cuda.source(name))


def text(name: str) -> str:
    return texts(name)[f"{name}.cu"]


# ---- they compile


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_70", "sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles(name, arch, tmp_path):
    try:
        version = cuda.nvrtc()[1]
    except cuda.Unavailable as e:
        if not shutil.which("nvcc"):
            pytest.skip(f"{e}, and there is no nvcc")
        flags = ["-cubin", "-std=c++17", f"-arch={arch}", f"-I{ROOT}/kernels", "-o", tmp_path / "made"]
        done = subprocess.run(["nvcc", *flags, cuda.source(name)], capture_output=True, text=True)
        if "Unsupported gpu architecture" in done.stderr:
            pytest.skip(f"this nvcc no longer makes {arch}")
        assert not done.returncode and not done.stderr, done.stderr
        return
    if arch == "sm_70" and version >= "13":
        pytest.skip(f"NVRTC {version} no longer makes {arch}")
    made = cuda.compile_(name, texts(name), arch)
    assert made[:4] == b"\x7fELF" and all(f.encode() in made for f in sources.functions(texts(name)))


def test_no_header_but_ours_is_needed():
    for name in NAMES:
        for file, content in texts(name).items():
            foreign = re.findall(r"^#include <(.*)>", content, re.MULTILINE)
            assert not foreign or file == "shared.h"
    shared = (ROOT / "kernels/shared.h").read_text()
    assert shared.index("#ifdef __CUDACC_RTC__") < shared.index("#else") < shared.index("<cstdint>")


# ---- they are called as the CPU's are


@pytest.mark.parametrize("name", NAMES)
def test_the_interface_is_the_cpus(name):
    """The same functions, with the same structs, which stand in headers that both include."""
    here, there = sources.functions(texts(name)), sources.functions(sources.read_sources(compile.source(name)))
    assert here and len(here) == text(name).count("__global__") and cuda.workloads(text(name)).keys() == here.keys()
    assert {f.removesuffix("_2") for f in here} == there.keys()
    for function, wanted in here.items():
        other = there[function.removesuffix("_2")]
        assert wanted.name == other.name and f"struct {wanted.name} {{" not in text(name)


def test_blocks_follow_the_work():
    total, per = cuda.workloads(text("norm"))["norm_backward"]
    assert (total, per) == ("N", "block") and cuda.blocks(dict(N=33, block=16), total, per) == 3
    assert cuda.workloads('// blocks: 5\nextern "C" __global__ void f(F a)') == {"f": ("5", "1")}
    assert cuda.blocks({}, "5", "1") == 5


# ---- they are found, kept and launched


class Driver:
    """A driver that writes down what is launched."""

    def __init__(self):
        self.launches, self.codes, self.contexts = [], [], 0

    def __getattr__(self, name):
        return lambda *_: 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = len(self.launches) + 1000
        return 0

    def cuCtxSetCurrent(self, context):
        self.contexts += 1
        return 0

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, None)
        self.launches.append((gx, bx, shared, stream.value, params))
        return self.codes.pop() if self.codes else 0


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A CUDA device that exists on paper."""
    made = Driver()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setattr(native, "told", set())
    monkeypatch.setattr(native, "mode", "auto")
    monkeypatch.setattr(cuda, "driver", lambda: made)
    monkeypatch.setattr(cuda, "nvrtc", lambda: (None, "13.0"))
    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(cuda, "compile_", lambda name, texts, arch: f"{name} for {arch}".encode())
    on_paper(monkeypatch)
    return made


def on_paper(monkeypatch) -> None:
    """torch says that there is a device, with a stream."""
    monkeypatch.setattr(torch.cuda, "device", lambda d: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))


def test_a_launch(pretended):
    lib = native.load_kernel("gelu", DEVICE)
    layout = sources.functions(texts("gelu"))["gelu_forward"].layout
    seen, launch = [], pretended.cuLaunchKernel

    def noting(*given):
        seen.append(layout.unpack(ctypes.string_at(given[9][0], layout.size)))
        return launch(*given)

    pretended.cuLaunchKernel = noting
    pretended.codes = [0, cuda.NO_CONTEXT]  # the last comes first
    lib.gelu_forward(x=11, y=None, n=2049, tanh=True, dtype=1)
    assert seen == [(11, 0, 2049, 1, 1)] * 2 and pretended.contexts == 2  # at loading, and for this thread
    assert [x[:4] for x in pretended.launches] == [(3, 256, 0, 77)] * 2
    lib.gelu_forward(x=11, y=12, n=0, tanh=True, dtype=1)
    assert len(seen) == 2  # nothing to do, and a grid of 0 is an error
    pretended.codes = [700]
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        lib.gelu_forward(x=11, y=12, n=5, tanh=False, dtype=0)


def test_a_second_half_is_launched_after_the_first(pretended):
    lib = native.load_kernel("norm", DEVICE)
    assert hasattr(lib, "norm_backward") and not hasattr(lib, "norm_backward_2")
    fields = sources.functions(texts("norm"))["norm_backward"].fields
    lib.norm_backward(**dict.fromkeys(fields, 0) | dict(drop=for_kernels(None), block=16, N=32, C=24))
    assert [x[0] for x in pretended.launches] == [2, 2]


def test_machine_code_is_compiled_once(pretended, monkeypatch):
    made, compile_ = [], cuda.compile_

    def noting(name, texts, arch):
        made.append((name, arch))
        return compile_(name, texts, arch)

    def cubin(arch):
        return cuda.cubin("gelu", texts("gelu"), arch)

    monkeypatch.setattr(cuda, "compile_", noting)
    assert cubin("sm_90") == cubin("sm_90") == b"gelu for sm_90"
    assert made == [("gelu", "sm_90")]
    (path,) = compile.cache_folder().glob("*")
    assert path.suffix == ".cubin" and not path.stat().st_mode & 0o077
    cubin("sm_80")
    path.write_bytes(b"half")
    assert cubin("sm_90") == b"gelu for sm_90" and len(made) == 3
    path.chmod(0o666)
    cubin("sm_90")
    monkeypatch.setattr(cuda, "nvrtc", lambda: (None, "14.0"))
    cubin("sm_90")
    assert len(made) >= 4


def on_device(dtype, device=DEVICE) -> SimpleNamespace:
    """What stands for a tensor."""
    return SimpleNamespace(dtype=dtype, device=device, is_cpu=device.type == "cpu")


def test_where_there_is_no_way_it_is_said_once(pretended, monkeypatch, capsys):
    def fails(name, texts, arch):
        raise cuda.Unavailable("NVRTC cannot compile")

    monkeypatch.setattr(cuda, "compile_", fails)
    monkeypatch.setattr(native, "PLAIN", {SimpleNamespace})
    x = on_device(torch.float32)
    assert native.kernel("gelu", x) is None and native.kernel("gelu", x) is None
    assert native.kernel("attention", x) is None
    assert capsys.readouterr().err == "gelu runs on its PyTorch reference on CUDA: NVRTC cannot compile\n"
    assert native.use("auto", DEVICE) == "native on CUDA sm_90, compiled at first use (NVRTC 13.0)"
    with pytest.raises(ValueError, match="--kernels is 'native', but NVRTC cannot compile; expected auto or reference"):
        native.use("native", DEVICE)
    monkeypatch.setattr(cuda, "driver", lambda: (_ for _ in ()).throw(cuda.Unavailable("no driver")))
    assert native.use("auto", DEVICE) == "PyTorch reference (no driver)"
    assert native.use("reference", DEVICE) == "PyTorch reference (asked for)"


def test_what_kernels_do_not_take_goes_to_the_reference(pretended, monkeypatch):
    monkeypatch.setattr(native, "PLAIN", {SimpleNamespace})
    x = on_device(torch.float32)
    assert native.kernel("gelu", x, None, x)
    for other in (torch.float64, torch.float16, torch.int64):
        assert native.kernel("gelu", x, on_device(other)) is None
    assert native.kernel("gelu", x, on_device(torch.float32, torch.device("cpu"))) is None
    assert native.kernel("gelu", on_device(torch.float16))
    assert native.kernel("gelu", on_device(torch.float64)) is None


# ---- they are right: emulated on the CPU, and on a device


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Path:
    """All of kernels/cuda/, compiled as C++ for this machine, with a driver to launch them: a library."""
    folder, files = tmp_path_factory.mktemp("emulated"), []
    needs_compiler()
    command = compile.compiler()[0]
    for name in NAMES:
        source = re.sub(r'^extern "C" __global__', "static", text(name), flags=re.MULTILINE)
        for function, wanted in sources.functions(texts(name)).items():
            call = f"{function}(*({wanted.name}*)params[0])"
            source += f'static emulated::Register {function}_("{function}", [](void** params) {{ {call}; }});\n'
        files.append(folder / f"{name}.cpp")
        files[-1].write_text('#include "emulate.h"\n' + source)
    flags = ["-O1", "-w", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off"]
    flags += [f"-I{place}" for place in (HERE, ROOT / "kernels", ROOT / "kernels/cuda")]
    out = folder / "libemulated.so"
    done = subprocess.run([*command, *flags, "-o", out, *files], capture_output=True, text=True)
    if done.returncode and "_Float16" in done.stderr:
        pytest.skip("this compiler has no _Float16")
    assert not done.returncode, done.stderr
    return out


@pytest.fixture
def emulated(emulator, monkeypatch) -> ctypes.CDLL:
    """Operators run the CUDA kernels on CPU tensors, by the emulated driver, which is returned."""
    monkeypatch.setattr(native, "mode", "native")
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setattr(cuda, "DRIVER", str(emulator))
    monkeypatch.setattr(cuda, "cubin", lambda name, texts, arch: b"")
    monkeypatch.setattr(cuda, "architecture", lambda device: "sm_90")
    on_paper(monkeypatch)

    def kernel(name, *tensors):
        fits = all(t is None or t.dtype is tensors[0].dtype and t.dtype in native.CODES for t in tensors)
        if not fits or native.mode != "native":
            return None
        return native.loaded[name, DEVICE] if (name, DEVICE) in native.loaded else native.load_kernel(name, DEVICE)

    monkeypatch.setattr(native, "kernel", kernel)
    cuda.driver.cache_clear()
    yield cuda.driver()
    cuda.driver.cache_clear()


@pytest.fixture(params=[pytest.param("emulated", marks=pytest.mark.slow), pytest.param("device", marks=needs_device)])
def place(request, monkeypatch) -> torch.device:
    """Where a test's tensors lie; operators run the CUDA kernels there."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return torch.device("cpu")
    monkeypatch.setattr(native, "mode", "native")
    monkeypatch.setattr(native, "loaded", {})
    return DEVICE


def draw(place, *shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape)).to(place, dtype).requires_grad_()


def noise(place, n: int) -> Noise:
    """Dropout keys for n tokens."""
    keys = in_mode("reference", token_keys, torch.arange(n), torch.zeros(n, dtype=torch.int64))
    return Noise(5, 6, keys.to(place))


SIZES = [(1, 2), (7, 63), (33, 128), (5, 260), (70, 17)]  # (N, C)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize("n,width", SIZES)
def test_dropout_is_the_reference_to_the_bit(n, width, p, dtype, place):
    x, dout = draw(place, n, width, dtype=dtype), [torch.randn(n, width)]
    ours, want = in_both_modes(results, lambda x: dropout(x, p, noise(place, n), 2), [x], dout)
    assert equal_bits(ours, want)


def test_words_are_the_reference_to_the_bit(place):
    words = torch.arange(-7000, 7000, 3, dtype=torch.int32, device=place)
    some = noise(place, 300)

    def all_words():
        return mix_tensor(words), mix_tensor(words, 0xFFFFFFF1), some.rows(3), some.cols(3, 500)

    ours, want = in_both_modes(all_words)
    assert equal_bits(ours, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("n,width", SIZES)
def test_add_norm(n, width, p, dtype, place):
    torch.manual_seed(n + width)
    inputs = [
        draw(place, n, width, dtype=dtype),
        draw(place, n, width, dtype=dtype),
        draw(place, width),
        draw(place, width),
    ]
    some = noise(place, n)
    judge(lambda x, r, w, b: add_norm(x, r, w, b, EPS, p, some, 3), inputs, [torch.randn(n, width) for _ in range(2)])


@pytest.mark.parametrize("used", [0, 1])
def test_add_norm_where_one_result_is_used_and_weights_are_frozen(used, place):
    w, b, some = *torch.randn(2, 65, device=place), noise(place, 9)

    def f(x, r):
        return add_norm(x, r, w.to(x.dtype), b.to(x.dtype), EPS, 0.2, some, 1)[used]

    judge(f, [draw(place, 9, 65), draw(place, 9, 65)], [torch.randn(9, 65)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("size", [1, 7, 1023, 5000])
def test_gelu(tanh, size, dtype, place):
    torch.manual_seed(size)

    def f(x):
        lib = None if native.mode == "reference" else native.kernel("gelu", x)
        return Gelu.apply(x, tanh, lib) if lib else F.gelu(x, approximate="tanh" if tanh else "none")

    judge(f, [draw(place, size, dtype=dtype, scale=3)], [torch.randn(size)])


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_keeps_the_digits_of_its_tail(tanh, place):
    x = torch.linspace(-9, -0.1, 5001, device=place)
    xd = x.double()
    u2 = (8 / torch.pi) ** 0.5 * (xd + 0.044715 * xd**3)
    want = xd * (torch.sigmoid(u2) if tanh else torch.special.erfc(-xd / 2**0.5) / 2)
    assert ((Gelu.apply(x, tanh, native.kernel("gelu", x)).double() - want) / want).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("vocabulary", [2, 7, 63, 1500])
def test_loss(vocabulary, with_bias, smoothing, dtype, place):
    torch.manual_seed(vocabulary)
    rows, width = 13, 24
    targets = torch.randint(vocabulary, (rows,), device=place)
    inputs = [draw(place, rows, width, dtype=dtype), draw(place, vocabulary, width)]
    inputs += [draw(place, vocabulary)] if with_bias else []

    def f(x, weight, bias=None):
        return linear_cross_entropy(x, weight, bias, targets, smoothing)[0]

    logits = inputs[0].detach().float() @ inputs[1].detach().t()
    judge(f, inputs, [torch.ones(())], largest=logits.abs().max().item())


def test_rows_of_logits_that_are_hard(place):
    """Ties, -inf, large numbers; an inf or NaN that comes in comes out."""
    z = torch.randn(8, 37)
    z[0], z[1, 5:], z[2, 3], z[3], z[4, 36] = 1.0, -torch.inf, 1e30, z[3] * 1e4, z[4].max() + 1
    z[5, 7], z[6, 7] = torch.inf, torch.nan
    targets = torch.tensor([0, 2, 3, z[3].argmax(), 36, 1, 1, 2])
    for offset in range(4):  # a row may begin anywhere
        rows = torch.empty(8 * 37 + offset, device=place)[offset:].view(8, 37).copy_(z)
        losses, hits, _ = cross_entropy(rows[:5].clone(), None, targets[:5].to(place), 0.0, True)
        want, right = F.cross_entropy(z[:5], targets[:5], reduction="sum"), (z[:5].argmax(1) == targets[:5]).sum()
        dz = z[:5].softmax(1) - F.one_hot(targets[:5], 37)
        assert torch.allclose(losses.sum().cpu(), want) and hits.item() == right.item()
        cross_entropy(rows, None, targets.to(place), 0.0, True)
        assert torch.allclose(rows[:5].cpu(), dz, atol=1e-6)
        assert rows[5:7].isnan().any(1).all() and not rows[7].isnan().any()


def test_an_unknown_target_is_nan(place):
    z, losses, hits = torch.randn(2, 5, device=place), *torch.empty(2, 2, device=place)
    targets = torch.tensor([5, -2], device=place)
    given = dict(z=z, bias=None, targets=targets, smoothing=0.0, loss=losses, hits=hits)
    native.kernel("loss", z).cross_entropy(**given, grad=0, M=2, V=5, stride=5, dtype=0)
    assert losses.isnan().all() and not hits.any()


def low_rank(some: Noise, W: torch.Tensor, B: torch.Tensor):
    """A layer with dropout before A: a function of x and A."""
    return lambda x, A: lora_linear(
        x, None, A, B, ByMatrix(lambda dtype: W.to(dtype)), 2.0, some.drop(0.2, 1, x.shape[1])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("n,width", [(1, 63), (130, 7), (7, 63), (33, 1023), (33, 260), (200, 132)])
def test_lora(n, width, rank, dtype, place):
    torch.manual_seed(n + width)
    W, B = torch.randn(61, width, device=place).bfloat16(), torch.randn(61, rank, device=place)
    x, A = draw(place, n, width, dtype=dtype), draw(place, rank, width)
    judge(low_rank(noise(place, n), W, B), [x, A], [torch.randn(n, 61)])


@pytest.mark.parametrize("trained", ["x", "A", ""])
def test_lora_where_one_gradient_is_wanted(trained, place):
    W, B, x, A = (draw(place, *s) for s in ((11, 260), (11, 5), (70, 260), (5, 260)))
    x, A = x.detach().requires_grad_(trained == "x"), A.detach().requires_grad_(trained == "A")
    f = low_rank(noise(place, 70), W.detach(), B.detach())
    judge(f, [x, A], [torch.randn(70, 11)]) if trained else f(x, A)


def test_lora_drops_what_dropout_drops(place):
    """Each rank sees one channel of x; and its way back is the same."""
    some, x, A = noise(place, 150), draw(place, 150, 132).detach(), torch.zeros(3, 132, device=place)
    A[0, 131], A[2, 5] = 1, 1
    drop = some.drop(0.3, 4, 132)
    want, h = dropout(x, 0.3, some, 4), shrink(x, A, drop)
    assert torch.equal(h[:, 0], want[:, 131]) and torch.equal(h[:, 2], want[:, 5]) and not h[:, 1].any()
    g, dx = torch.eye(3, device=place)[torch.arange(150, device=place) % 3].contiguous(), torch.zeros_like(x)
    dA = spread(x, g, A, dx, drop)
    assert torch.equal(dx[0::3, 131] != 0, want[0::3, 131] != 0) and torch.equal(dx[2::3, 5] != 0, want[2::3, 5] != 0)
    assert torch.allclose(dA[1], want[1::3].sum(0), atol=1e-5) and dA.untyped_storage().nbytes() == dA.nbytes


def test_lora_of_one_channel(place):
    some, x, A = noise(place, 130), draw(place, 130, 1).detach(), draw(place, 1, 1).detach()
    drop, dx = some.drop(0.3, 4, 1), torch.zeros_like(x)
    want = dropout(x, 0.3, some, 4)
    assert torch.equal(shrink(x, A, drop), want * A)
    assert torch.allclose(spread(x, x, A, dx, drop), (x * want).sum(0, keepdim=True), rtol=1e-5)
    assert torch.allclose(dx, want * A)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("width", [63, 132])
def test_lora_shows_what_is_not_a_number(width, bad, place):
    some, x, A = noise(place, 71), draw(place, 71, width).detach(), draw(place, 3, width).detach()
    drop, dx = some.drop(0.3, 4, width), torch.zeros_like(x)
    for row in (0, 70):  # alone at its end
        hurt, g = x.clone(), torch.ones(71, 3, device=place)
        hurt[row, 1] = bad
        h = shrink(hurt, A, drop)
        assert not h[row].isfinite().any() and h.isfinite().sum() == h.numel() - 3
        dA = spread(hurt, g, A, None, drop)
        assert not dA[:, 1].isfinite().any() and dA.isfinite().sum() == dA.numel() - 3
        g[row, 2] = bad
        spread(None, g, A, dx.zero_(), drop)
        assert not dx[row].isfinite().any() and dx.isfinite().sum() == dx.numel() - width


def test_lora_of_no_rows_leaves_everything(place):
    A, x = draw(place, 3, 70).detach(), torch.empty(0, 70, device=place)
    words = torch.empty(0, dtype=torch.int32, device=place), torch.zeros(70, dtype=torch.int32, device=place)
    drop = Drop(*words, 0.3)
    dx = x.clone()
    assert shrink(x, A, drop).shape == (0, 3) and not spread(x, x[:, :3], A, dx, drop).any()
    lib, sums = native.kernel("lora", A), torch.ones(1, 3, 70, device=place)
    given = dict(x=x, g=x, A=A, sums=sums, dx=dx, drop=for_kernels(drop))
    lib.lora_backward(**given, block=64, offsets=None, examples=0, N=0, C=70, R=3, lda=70, dtype=0)
    assert not sums.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_asked_about_is_zero(place, dtype):
    z = torch.randn(3, 37).to(dtype).to(place)
    z[1] = torch.nan  # whatever stands there
    whole, targets = z.clone(), torch.tensor([5, -1, 36], device=place)
    losses, hits, dz = cross_entropy(z, None, targets, 0.1, True)
    want, right, rows = cross_entropy(whole[[0, 2]], None, targets[[0, 2]], 0.1, True)
    assert losses.sum().item() == pytest.approx(want.sum().item()) and hits.item() == right.item()
    assert torch.equal(dz[[0, 2]], rows) and not dz[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128, 1000, 20001])
def test_nf4_is_the_reference_to_the_bit(n, dtype, place):
    torch.manual_seed(n)
    w = torch.randn(n).to(place, dtype)
    w[: n // 3] = 0

    def there_and_back():
        codes, absmax = nf4.quantize(w[None])
        d, nested, mean = nf4.compress(absmax)
        plain = nf4.dequantize(codes, absmax, torch.empty_like(w))
        return codes, absmax, plain, nf4.dequantize(codes, d, torch.empty_like(w), nested, mean)

    ours, want = in_both_modes(there_and_back)
    assert equal_bits(ours, want)


@pytest.mark.parametrize("view", ["one element in", "transposed", "every other", "expanded"])
def test_views(view, place):
    """A view gives what its copy gives, also as a gradient."""
    base, some = torch.randn(2000, device=place), noise(place, 20)
    x = {
        "one element in": lambda: base[1:1201].view(20, 60),
        "transposed": lambda: base[:1200].view(60, 20).t(),
        "every other": lambda: base[:2000].view(20, 100)[:, :80:2],
        "expanded": lambda: base[:60].expand(20, 60),
    }[view]()
    ones = torch.ones(2, x.shape[1], device=place)
    for f in (
        lambda x: dropout(x, 0.1, some, 1),
        lambda x: add_norm(x, x * 0.5, *ones, EPS, 0.1, some, 1),
        gelu_tanh,
    ):
        found = []
        for v in (x, x.contiguous()):
            v = v.detach().requires_grad_()
            y = f(v)
            y = y if isinstance(y, tuple) else (y,)
            found.append([*y, *torch.autograd.grad(y, v, y)])
        assert equal_bits(*found)
    A, drop = torch.randn(3, x.shape[1], device=place), some.drop(0.1, 1, x.shape[1])
    for a in (A, A.t().contiguous().t()):
        found = []
        for v in (x, x.contiguous()):
            y, dx = shrink(v, a, drop), torch.zeros_like(v, memory_format=torch.contiguous_format)
            found.append([y, dx, spread(v, y[:, :1].expand(-1, 3), a, dx, drop)])
        assert equal_bits(*found)


@pytest.mark.slow
@pytest.mark.parametrize("threads,most,backwards", [(32, 1, 0), (96, 2, 0), (256, 7, 1), (64, 3, 1)])
def test_results_do_not_depend_on_the_grid(threads, most, backwards, emulated):
    torch.manual_seed(0)
    x, r, w, b, A = (torch.randn(*s).requires_grad_() for s in ((70, 100), (70, 100), (100,), (100,), (9, 100)))
    targets, some, runs = torch.randint(100, (70,)), noise(torch.device("cpu"), 70), []

    def f():
        h, y = add_norm(x, r, w, b, EPS, 0.1, some, 1)
        y = low_rank(some, torch.eye(100), torch.ones(100, 9))(y, A)
        z = linear_cross_entropy(gelu_tanh(dropout(y, 0.1, some, 2)) + h, w.diag(), b, targets)[0]
        return [z, *torch.autograd.grad(z, [x, r, w, b, A])]

    emulated.shape.argtypes = [ctypes.c_int64] * 3
    for shape in ((64, 3, 0), (threads, most, backwards), (64, 3, 0)):
        emulated.shape(*shape)
        runs.append(f())
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*runs[:2], strict=True))
    assert equal_bits(runs[0], runs[2])


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_model_on_all_kernels(method, place, tmp_path, monkeypatch):
    """Loss and gradients of a BERT are those of the references."""
    from helpers import random_ids, sequence, small_bert

    import minift
    from minift.data.batch import pack
    from minift.tasks import task_named

    native.mode = "reference"
    model, _ = minift.load(small_bert(tmp_path), task="classify", labels=["a", "b"])
    if method == "qlora":
        minift.add_lora(minift.quantize(model))
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(p, std=0.1)
    model.to(place)
    batch = pack([sequence(i, ids, [0], [i % 2]) for i, ids in enumerate(random_ids([5, 9, 2], 64))]).to(place)
    learned = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        loss, _ = task_named("classify").loss(model, batch, Noise(1, 2, batch.keys))
        return [loss, *torch.autograd.grad(loss, learned, allow_unused=True)]

    for x, y in zip(*in_both_modes(gradients), strict=True):
        assert x is y is None or torch.allclose(x, y, rtol=1e-4, atol=1e-5)


# ---- attention: PyTorch's flash kernel


def pretend_flash(q, k, v, from_q, from_k, most_q, most_k, p, causal, debug, scale):
    """What the kernel computes from whole sequences, with its five results; the seed is in the fourth."""
    assert q.shape == k.shape and from_q.dtype == from_k.dtype == torch.int32 and most_q == most_k and not debug
    assert most_q >= from_q.diff().max()
    out = torch.cat(
        [
            F.scaled_dot_product_attention(*(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=causal, scale=scale)
            for a, b in zip(from_q[:-1], from_q[1:], strict=True)
        ],
        1,
    )
    return out.transpose(0, 1).contiguous(), torch.zeros(1), torch.tensor(p), torch.tensor(0), None


def pretend_flash_backward(dout, q, k, v, out, lse, from_q, from_k, most_q, most_k, p, causal, state, more, scale):
    assert state.item() == pytest.approx(p)
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = pretend_flash(q, k, v, from_q, from_k, most_q, most_k, p, causal, False, scale)[0]
        return torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [None, [0, 3, 4, 9], [2, 5, 11]])
def test_flash_is_asked_for_whole_sequences(causal, rows, monkeypatch):
    offsets = torch.tensor([0, 3, 5, 12])
    rows = None if rows is None else torch.tensor(rows)
    q, k, v = (torch.randn(12, 2, 8, requires_grad=True) for _ in range(3))
    found = []
    for takes in (False, True):
        monkeypatch.setattr(flash, "takes", lambda *_, takes=takes: takes)
        monkeypatch.setattr(flash, "FORWARD", pretend_flash)
        monkeypatch.setattr(flash, "BACKWARD", pretend_flash_backward)
        settings = Settings(0.3, causal, longest=7)
        out = attention(q if rows is None else q[rows], k, v, offsets, rows, settings)
        found.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) * 0.7)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_flashs_seed_follows_seed_step_site_and_size(monkeypatch):
    seeds, some = [], noise(torch.device("cpu"), 12)
    monkeypatch.setattr(flash, "seeded", lambda device, seed: (seeds.append(seed), nullcontext())[1])
    monkeypatch.setattr(flash, "FORWARD", pretend_flash)
    x = torch.randn(12, 2, 8)
    for p, step, site, cut in (
        (0.1, 1, 1, 5),
        (0.1, 1, 1, 5),
        (0.1, 2, 1, 5),
        (0.1, 1, 2, 5),
        (0.1, 1, 1, 11),
        (0.0, 1, 1, 5),
    ):
        offsets = torch.tensor([0, cut, 12] if cut < 11 else [0, 12])
        flash.flash(x, x, x, offsets, None, Settings(0.3, False, p, Noise(7, step, some.keys), site, 12))
    assert len(seeds) == 5 and seeds[0] == seeds[1] and len(set(seeds)) == 4 and all(0 <= s < 2**64 for s in seeds)


def test_flash_has_the_interface_of_this_torch():
    """Without a device: shapes alone, on the meta device."""
    q, k = (torch.empty(n, 12, 64, dtype=torch.bfloat16, device="meta") for n in (100, 100))
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    out, lse, state, more, _ = flash.FORWARD(q, k, k, offsets, offsets, 64, 64, 0.1, True, False, scale=0.125)
    given = out, lse, offsets, offsets, 64, 64, 0.1, True, state, more
    dq, dk, dv = flash.BACKWARD(out, q, k, k, *given, scale=0.125)
    assert out.shape == q.shape == dq.shape == dk.shape == dv.shape and lse.shape == (12, 100)


# ---- only on a device


@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
def test_attention_on_a_device(with_rows, causal, dtype, monkeypatch):
    monkeypatch.setattr(native, "mode", "native")
    place = torch.device("cuda", 0)
    torch.manual_seed(0)
    offsets = torch.tensor([0, 130, 131, 300], device=place)
    rows = torch.tensor([0, 7, 130, 131, 250], device=place) if with_rows else None
    q, k, v = (draw(place, 300, 4, 64, dtype=dtype) for _ in range(3))
    q = q.detach()[rows].requires_grad_() if with_rows else q
    if not flash.takes(q, k, v):
        pytest.skip("no flash kernel for this device")
    settings = Settings(0.125, causal)
    judge(lambda q, k, v: attention(q, k, v, offsets, rows, settings), [q, k, v], [torch.randn(q.shape)])


@needs_device
def test_attentions_dropout_on_a_device(monkeypatch):
    """The same mask for the same seed, the right rate, and the user's generator left alone."""
    monkeypatch.setattr(native, "mode", "native")
    place = torch.device("cuda", 0)
    offsets = torch.tensor([0, 256, 512], device=place)
    q = torch.zeros(512, 4, 64, device=place, dtype=torch.bfloat16)
    v = torch.ones_like(q)
    if not flash.takes(q, q, v):
        pytest.skip("no flash kernel for this device")
    state, given = torch.cuda.get_rng_state(), dict(p=0.3, noise=noise(place, 512), longest=256)
    a, b, c = (attention(q, q, v, offsets, None, Settings(0.125, site=s, **given)) for s in (1, 1, 4))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.cuda.get_rng_state())
    assert abs(a.float().mean().item() - 1) < 0.02 and a.float().std().item() > 0.01


@needs_device
def test_operators_can_be_captured_in_a_graph(monkeypatch):
    monkeypatch.setattr(native, "mode", "native")
    place = torch.device("cuda", 0)
    x, w, targets, some = (
        draw(place, 64, 768),
        draw(place, 99, 768),
        torch.randint(99, (64,), device=place),
        noise(place, 64),
    )
    ones, zeros, A = torch.ones(768, device=place), torch.zeros(768, device=place), draw(place, 8, 768)

    def step():
        h, y = add_norm(x, x * 0.5, ones, zeros, EPS, 0.1, some, 1)
        y = low_rank(some, w.detach(), ones[:99, None].expand(-1, 8))(y, A)
        loss = linear_cross_entropy(gelu_tanh(dropout(y, 0.1, some, 2)), w[:, :99], None, targets)[0] + h.sum()
        return [loss, *torch.autograd.grad(loss, [x, w, A])]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        want = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))


@needs_device
def test_a_run_on_a_device(tmp_path, monkeypatch):
    """A few steps of training: the kernels and the references give the same losses."""
    from helpers import reviews, small_bert

    import minift

    monkeypatch.setattr(native, "mode", "auto")
    base, file, losses = small_bert(tmp_path / "base"), reviews(tmp_path / "reviews.tsv", 40), []
    for kernels in ("native", "reference"):
        out = tmp_path / kernels
        model, tokenizer = minift.load(base, task="classify", labels=["praise", "blame"], seed=1)
        config = minift.TrainConfig(
            model=str(base), data=str(file), out=str(out), steps=6, device="cuda", precision="fp32", kernels=kernels
        )
        minift.train(model, tokenizer, config)
        losses.append([float(x) for x in re.findall(r'"train/loss": ([\d.]+)', (out / "metrics.jsonl").read_text())])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)
