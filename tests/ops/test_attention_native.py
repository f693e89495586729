"""Attention's C++ kernel against float64 and plain PyTorch: outputs, gradients, masks, views, threads, memory.

python -m pytest tests/ops/test_attention_native.py
"""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import at_most_twice, equal_bits, greatest, needs_compiler, root_mean_square
from test_attention import SITE, attend, plain

from minift.data.batch import token_keys
from minift.ops import compile, native, sources
from minift.ops.dropout import Noise, keep

pytestmark = pytest.mark.slow

needs_compiler(allow_module_level=True)

MIXED = [1, 7, 63, 0, 130, 65]


@pytest.fixture(autouse=True, scope="module")
def native_mode():
    before, native.mode = native.mode, "native"
    yield
    native.mode = before


def without(*instructions):
    """The flags that make the compiler do without these, of those that this CPU has."""
    flags = {"amx_bf16": " -mno-amx-bf16", "avx512_bf16": " -mno-avx512bf16"}
    return "".join(flags[name] for name in instructions if name in compile.cpu())


BY_FLOATS = without("amx_bf16", "avx512_bf16")
BY_TILES = without("avx512_bf16") + " -DTILES_BY_LOOPS"  # in place of AMX's instructions
BY_PAIRS = without("amx_bf16") + " -DPAIRS_BY_LOOPS"  # in place of AVX512-BF16's
KINDS = {
    "float32": (torch.float32, ""),
    "bfloat16": (torch.bfloat16, ""),  # as this CPU does it
    "tiles": (torch.bfloat16, BY_TILES),
    "pairs": (torch.bfloat16, BY_PAIRS),
}
if BY_FLOATS:  # elsewhere this is how it does it
    KINDS["floats"] = (torch.bfloat16, BY_FLOATS)


@pytest.fixture(params=KINDS)
def dtype(request, monkeypatch):
    """A dtype, with the kernel that works on it: bfloat16 has three (attention_tiles.h, attention_pairs.h)."""
    dtype, flags = KINDS[request.param]
    if flags:
        compile_with(flags, monkeypatch)
    return dtype


def compile_with(flags, monkeypatch):
    """Puts the kernel made with these flags in the place of the other."""
    monkeypatch.setattr(compile, "FLAGS", compile.FLAGS + flags)
    monkeypatch.setitem(native.loaded, ("attention", native.CPU), compile.build("attention"))


def pack(lengths):
    """offsets (S + 1,) and noise."""
    lengths = torch.tensor(lengths)
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return offsets, Noise(1, 2, token_keys(numbers, positions))


def draw(n, heads, size, dtype=torch.float32):
    """q, k, v and the output's gradient, (N, H, D)."""
    torch.manual_seed(0)
    return [torch.randn(n, heads, size).to(dtype) for _ in range(4)]


def every(f, q, k, v, dout, offsets, rows=None, *, noise=None, **options):
    """f's output and the gradients of q, k and v, where the queries are those of `rows`."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    if f is attend:
        asked = q if rows is None else q[rows]
        out = attend(asked, k, v, offsets, rows, noise=noise.at(rows), site=SITE, **options)
    else:
        out = plain(q, k, v, offsets, rows, noise=noise, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), (dout if rows is None else dout[rows]).to(out.dtype))]


def judge(inputs, offsets, rows=None, largest=1.0, **options):
    """Error against float64 at most twice that of plain PyTorch in the same dtype: root mean square, and largest.

    Where PyTorch happens to be all but exact (one key, a head size of 1) a few roundings of the largest number pass.
    largest: of the scores, where they are larger than the results: they are rounded before exp makes them relative.
    """
    truth = every(plain, *(t.double() for t in inputs), offsets, rows, **options)
    ours, theirs = (every(f, *inputs, offsets, rows, **options) for f in (attend, plain))
    for t, a, b in zip(truth, ours, theirs, strict=True):
        assert a.shape == t.shape and a.isfinite().all()
        if t.numel():
            floor = torch.finfo(a.dtype).eps * largest * max(greatest(t), 1)
            at_most_twice(a, b, t, floor / 2, root_mean_square)
            at_most_twice(a, b, t, 4 * floor)


@pytest.mark.parametrize("flags", [BY_TILES, BY_PAIRS], ids=["tiles", "pairs"])
def test_each_way_is_in_use(flags, monkeypatch):
    """By floats, which is what else there is, P is not rounded before it is multiplied: results have other bits."""
    offsets, noise = pack(MIXED)
    inputs = draw(sum(MIXED), 2, 64, torch.bfloat16)
    options = dict(scale=0.125, noise=noise)
    found = []
    for way in (BY_FLOATS, flags):
        with monkeypatch.context() as patch:
            compile_with(way, patch)
            found.append(every(attend, *inputs, offsets, **options))
    assert not any(map(torch.equal, *found))


def some(kind, offsets):
    """Token numbers of the queries of that kind."""
    n, first, last = int(offsets[-1]), offsets[:-1], offsets[1:] - 1
    return {
        "all": None,
        "some": torch.arange(0, n, 3),
        "first": first[last >= first],
        "last": last[last >= first],
        "few": torch.cat([torch.arange(int(a), min(int(a) + 5, int(b))) for a, b in zip(first, last + 1, strict=True)]),
        "one sequence's": torch.arange(80, 120),
        "none": torch.tensor([], dtype=torch.int64),
    }[kind]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("heads, size", [(1, 1), (3, 7), (12, 32), (2, 64), (3, 80), (1, 128)])
def test_error_is_at_most_twice_plain_pytorchs(heads, size, causal, p, dtype):
    offsets, noise = pack(MIXED)
    judge(draw(sum(MIXED), heads, size, dtype), offsets, scale=size**-0.5, causal=causal, p=p, noise=noise)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("asked", ["some", "first", "last", "few", "one sequence's", "none"])
def test_rows(asked, causal, dtype):
    offsets, noise = pack(MIXED)
    rows = some(asked, offsets)
    judge(draw(sum(MIXED), 3, 48, dtype), offsets, rows, scale=0.2, causal=causal, p=0.4, noise=noise)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_long_sequences(causal, dtype):
    """Several tiles of queries and of keys, and several pieces of forward."""
    lengths = [1, 1023, 7, 1024]
    offsets, noise = pack(lengths)
    judge(draw(sum(lengths), 2, 64, dtype), offsets, scale=0.125, causal=causal, p=0.1, noise=noise)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_masks_are_the_references_bit_for_bit(causal, dtype):
    """With one-hot values the output is drop(P) itself; with a one-hot gradient, dV is its transpose."""
    lengths, heads = [1, 40, 127, 128], 3
    offsets, noise = pack(lengths)
    q, k, _, _ = draw(sum(lengths), heads, 128, dtype)
    hot = torch.eye(128, dtype=dtype)[torch.cat([torch.arange(n) for n in lengths])].unsqueeze(1).expand(-1, heads, -1)
    out, _, _, dv = every(attend, q, k, hot, hot, offsets, scale=0.01, causal=causal, p=0.4, noise=noise)
    for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        n = b - a
        words = noise.cols(SITE, n * heads).view(n, heads)
        want = keep(noise.rows(SITE)[a:b, None, None], words, 0.4).transpose(1, 2)  # query, head, key
        if causal:
            want = want & torch.ones(n, n, dtype=torch.bool).tril()[:, None]
        assert torch.equal(out[a:b, :, :n] != 0, want)
        assert torch.equal(dv[a:b, :, :n] != 0, want.transpose(0, 2))


def test_views_give_the_same_bits(dtype):
    offsets, noise = pack(MIXED)
    tensors = draw(sum(MIXED), 3, 40, dtype)
    options = dict(scale=0.2, p=0.4, noise=noise)
    want = every(attend, *tensors, offsets, **options)
    product = torch.stack(tensors, 1)  # (N, 4, H, D), as GPT-2's c_attn makes it
    odd = torch.empty(product.numel() + 1, dtype=dtype)[1:].view(product.shape).copy_(product)  # misaligned
    turned = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in tensors]  # D is not the innermost
    for views in (product.unbind(1), odd.unbind(1), turned):
        assert equal_bits(every(attend, *views, offsets, **options), want)


def test_a_gradient_without_strides():
    """out.sum() hands back one number, expanded."""
    offsets, noise = pack(MIXED)
    q, k, v, _ = draw(sum(MIXED), 3, 8)
    ones = torch.ones(1, 1, 1).expand_as(q)
    want, got = (every(attend, q, k, v, t, offsets, scale=1.0, p=0.1, noise=noise) for t in (ones.contiguous(), ones))
    assert equal_bits(got, want)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_scores(size, dtype):
    """Scores far beyond exp's range neither overflow nor lose the largest."""
    offsets, noise = pack(MIXED)
    q, k, v, dout = draw(sum(MIXED), 2, 16, dtype)
    largest = 0.25 * size * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    judge((q * size, k, v, dout), offsets, largest=largest, scale=0.25, noise=noise)


@pytest.mark.parametrize("which, value", [("q", torch.inf), ("k", torch.inf), ("v", -torch.inf), ("v", torch.nan)])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_an_inf_stays_visible_and_at_home(which, value, causal, dtype):
    """It shows in what it touches, and changes no bit of another sequence or head."""
    offsets, noise = pack([70, 140, 3])
    clean = draw(213, 2, 16, dtype)
    dirty = [t.clone() for t in clean]
    dirty["qkv".index(which)][75, 1, 3] = value  # the second sequence's sixth token, second head
    options = dict(scale=0.3, causal=causal, p=0.0, noise=noise)
    want, got = every(attend, *clean, offsets, **options), every(attend, *dirty, offsets, **options)
    for w, g in zip(want, got, strict=True):
        home = torch.zeros(w.shape, dtype=torch.bool)
        home[70:210, 1] = True
        assert torch.equal(w[~home], g[~home])
    out, dq, dk, dv = got
    touched = {"q": out[75, 1], "k": out[75:210, 1], "v": out[75:210, 1, 3]}[which]
    assert not touched.isfinite().any() if which != "k" else not touched.isfinite().all()
    assert not dq[75, 1].isfinite().any()


def test_threads_change_no_bit(dtype):
    lengths = [300, 1, 513, 22, 22, 22, 64]
    offsets, noise = pack(lengths)
    tensors, before = draw(sum(lengths), 5, 24, dtype), torch.get_num_threads()
    runs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(every(attend, *tensors, offsets, scale=0.2, causal=True, p=0.1, noise=noise))
    finally:
        torch.set_num_threads(before)
    assert equal_bits(runs[0], runs[1]) and equal_bits(runs[0], runs[2])


def test_no_matrix_of_scores_is_saved():
    offsets, noise = pack([200])
    q, k, v, _ = (t.requires_grad_() for t in draw(200, 2, 8))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attend(q, k, v, offsets, scale=0.3, p=0.5, noise=noise, site=SITE)
    assert sum(sizes) == 3 * q.numel() + 200 * 2 * 2  # q, k, v and two numbers per query and head


@pytest.mark.parametrize("dtypes", [[torch.float64] * 3, [torch.float16] * 3, [torch.float32, torch.bfloat16] * 2])
def test_other_dtypes_run_the_reference(dtypes, monkeypatch):
    monkeypatch.setattr("minift.ops.attention.run", lambda *_: pytest.fail("the kernel was called"))
    offsets, noise = pack([3, 4])
    q, k, v = (t.to(dtype) for t, dtype in zip(draw(7, 2, 8)[:3], dtypes, strict=False))
    if len(set(dtypes)) == 1:
        assert attend(q, k, v, offsets, scale=0.3, p=0.5, noise=noise).dtype == dtypes[0]
    else:
        with pytest.raises(RuntimeError):
            attend(q, k, v, offsets, scale=0.3, p=0.5, noise=noise)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_packs(data):
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=6).filter(sum))
    heads, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    offsets, noise = pack(lengths)
    asked = data.draw(st.none() | st.sets(st.integers(0, sum(lengths) - 1)))
    rows = None if asked is None else torch.tensor(sorted(asked), dtype=torch.int64)
    options = dict(
        scale=size**-0.5, causal=data.draw(st.booleans()), p=data.draw(st.sampled_from([0.0, 0.1, 0.9])), noise=noise
    )
    inputs = draw(sum(lengths), heads, size)
    truth = every(plain, *(t.double() for t in inputs), offsets, rows, **options)
    for t, a in zip(truth, every(attend, *inputs, offsets, rows, **options), strict=True):
        assert torch.allclose(a.double(), t, rtol=1e-4, atol=1e-4)


DRIVER = """
#include "attention.cpp"
#include <memory>
#include <vector>

template <class T> void run(std::vector<int64_t> offsets, std::vector<int64_t> rows, bool all, int64_t H, int64_t D,
                            bool causal, bool drop, int64_t dtype) {
    const int64_t S = offsets.size() - 1, N = offsets[S], M = all ? N : rows.size(), workers = 2;
    int64_t found[2];
    const AttentionScratch asked{offsets.data(), S, D, found};
    attention_scratch(&asked);
    auto make = [&](int64_t n) {  // exactly as large as it has to be, so that one step beyond is seen
        std::unique_ptr<T[]> x(new T[n]);
        for (int64_t i = 0; i < n; i++) store(&x[i], float(i * 7 % 11) / 11 - 0.5f);
        return x;
    };
    auto q = make(M * H * D), k = make(N * H * D), v = make(N * H * D), out = make(M * H * D), dout = make(M * H * D);
    auto dq = make(M * H * D), dk = make(N * H * D), dv = make(N * H * D);
    std::unique_ptr<float[]> stats(new float[2 * M * H]), scratch(new float[found[1] * workers]);
    std::unique_ptr<int32_t[]> keys(new int32_t[M]);
    for (int64_t i = 0; i < M; i++) keys[i] = int32_t(i);
    const int64_t w = H * D;
    for (int64_t backward = 0; backward < 2; backward++) {
        Attention a{};
        a.q = {q.get(), w, D}, a.k = {k.get(), w, D}, a.v = {v.get(), w, D}, a.dout = {dout.get(), w, D};
        a.out = out.get(), a.stats = stats.get(), a.dq = dq.get(), a.dk = dk.get(), a.dv = dv.get();
        a.offsets = offsets.data(), a.rows = all ? nullptr : rows.data();
        a.M = M, a.S = S, a.H = H, a.D = D, a.longest = found[0], a.workers = workers, a.scratch = scratch.get();
        a.keys = drop ? keys.get() : nullptr, a.salt_row = 3, a.salt_col = 4, a.threshold = 1 << 30;
        a.scale = 0.3f, a.inverse = drop ? 4 / 3.0f : 1.0f, a.causal = causal, a.backward = backward, a.dtype = dtype;
        attention(&a);
    }
    for (int64_t i = 0; i < N * w; i++)
        if (!std::isfinite(load(&dk[i]) + load(&dv[i]))) __builtin_trap();
    for (int64_t i = 0; i < M * w; i++)
        if (!std::isfinite(load(&out[i]) + load(&dq[i]))) __builtin_trap();
}

int main() {
    const std::vector<int64_t> offsets{0, 1, 8, 8, 71, 201, 501};
    for (int64_t D : {1, 7, 16, 33, 64, 80, 128})
        for (int causal = 0; causal < 2; causal++)
            for (auto rows : {std::vector<int64_t>{}, {0, 1, 70, 71, 500}, {3}, {72, 73, 74, 75, 76, 77, 200}})
                for (int all = 0; all < 2; all++) {
                    run<float>(offsets, rows, all, 3, D, causal, causal == all, 0);
                    run<bf16>(offsets, rows, all, 1, D, causal, causal != all, 1);
                }
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("loops", ["", BY_TILES, BY_PAIRS], ids=["", "tiles", "pairs"])
def test_memory_and_undefined_behaviour(tmp_path, loops):
    """A program of its own with the compiler's sanitizers: no byte outside a buffer is touched."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    flags = [f for f in (compile.FLAGS + loops).split() if f not in ("-O3", "-shared")]
    sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = ["-I", str(sources.folder()), "-I", str(sources.folder() / "cpu"), "driver.cpp", "-o", "driver"]
    made = subprocess.run(
        [*compile.compiler()[0], *flags, *sanitize, *files], cwd=tmp_path, capture_output=True, text=True
    )
    if "cannot find" in made.stderr:
        pytest.skip(f"this compiler has no sanitizers: {made.stderr[-200:]}")
    assert made.returncode == 0, made.stderr
    done = subprocess.run(["./driver"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
