"""The loader of native kernels: what it caches, what it distrusts, and what it says where there is no way.

python -m pytest tests/ops/test_native.py
"""

import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from judging import needs_compiler

from minift import files
from minift.config import TrainConfig
from minift.measure.track import peak_memory
from minift.ops import compile, lora, native, sources
from minift.ops.dropout import Drop
from minift.ops.gelu import gelu_erf

ROOT = Path(__file__).parents[2]
needs_compiler(allow_module_level=True)

ADD = """
#include "common.h"
struct Add {
    const float* x;
    float* y;
    double by;
    int64_t n;
};
extern "C" void add(const Add* a) {
    for (int64_t i = 0; i < a->n; i++) a->y[i] = a->x[i] + float(a->by);
}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A loader that has loaded nothing, with an empty cache and one small kernel, `add`."""
    folder = tmp_path / "kernels/cpu"
    folder.mkdir(parents=True)
    (folder / "add.cpp").write_text(ADD)
    for header in ("shared.h", "cpu/common.h"):
        (tmp_path / "kernels" / header).write_text((ROOT / "kernels" / header).read_text())
    monkeypatch.setattr(sources, "folder", lambda: tmp_path / "kernels")
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setattr(native, "making", {})
    monkeypatch.setattr(native, "told", set())
    monkeypatch.setattr(native, "mode", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    find = compile.compiler
    find.cache_clear()
    yield
    find.cache_clear()


def adds(library) -> bool:
    """Whether `add` works."""
    x, y = torch.ones(5), torch.empty(5)
    library.add(x=x, y=y, by=2.5, n=5)
    return y.tolist() == [3.5] * 5


def cached() -> list[Path]:
    return sorted(compile.cache_folder().glob("*"))


def compiles(monkeypatch) -> list[str]:
    """The names of what is compiled from here on."""
    names, compile_ = [], compile.compile_

    def noted(name, flags, out):
        names.append(name)
        compile_(name, flags, out)

    monkeypatch.setattr(compile, "compile_", noted)
    return names


def again(monkeypatch):
    """`add` as a new process would load it."""
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setattr(native, "making", {})
    return native.kernel("add", torch.ones(1))


def test_a_kernel_is_compiled_once_and_then_found(monkeypatch):
    names = compiles(monkeypatch)
    assert adds(native.kernel("add", torch.ones(1))) and names == ["add"]
    (path,) = cached()
    assert path.stat().st_mode & 0o077 == 0 and path.suffix == ".so"
    assert adds(again(monkeypatch)) and names == ["add"]
    assert native.kernel("add", torch.ones(1)) is native.kernel("add", torch.ones(1))


FILES = {"source": "cpu/add.cpp", "header": "cpu/common.h", "shared header": "shared.h"}


@pytest.mark.slow
@pytest.mark.parametrize("what", [*FILES, "flags", "compiler", "cpu"])
def test_whatever_it_is_made_from_is_in_the_key(what, monkeypatch):
    before = key_of_add()
    if what in FILES:
        path = sources.folder() / FILES[what]
        path.write_text(path.read_text() + "\n")
    elif what == "flags":
        monkeypatch.setattr(compile, "FLAGS", compile.FLAGS.replace("-O3", "-O2"))
    elif what == "compiler":
        monkeypatch.setattr(compile, "compiler", lambda: (["c++"], "another version"))
    else:
        monkeypatch.setattr(compile, "cpu", lambda: "another CPU")
    assert key_of_add() != before


def key_of_add() -> str:
    return compile.key(sources.read_sources(compile.source("add")))


def test_the_cpu_is_told_from_others():
    assert len(compile.cpu()) > 20


def test_a_cache_made_for_another_cpu_is_not_used(monkeypatch):
    assert native.kernel("add", torch.ones(1))
    names = compiles(monkeypatch)
    monkeypatch.setattr(compile, "cpu", lambda: "another CPU")
    assert adds(again(monkeypatch)) and names == ["add"] and len(cached()) == 2


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_can_write_is_not_loaded(what, monkeypatch):
    assert native.kernel("add", torch.ones(1))
    (path,) = cached()
    loose = path if what == "file" else path.parent
    loose.chmod(0o777)
    names, opened = compiles(monkeypatch), []
    load = compile.Library
    monkeypatch.setattr(compile, "Library", lambda path, texts: (opened.append(path), load(path, texts))[1])
    assert adds(again(monkeypatch)) and names == ["add"]
    assert what == "file" or opened[0].parent != path.parent


def test_what_belongs_to_others_is_not_loaded(monkeypatch):
    assert native.kernel("add", torch.ones(1))
    names, me = compiles(monkeypatch), os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert not files.private(cached()[0])
    assert adds(again(monkeypatch)) and names == ["add"]


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\x7fELF but no more", "half"])
def test_a_damaged_file_is_made_again(content, monkeypatch):
    assert native.kernel("add", torch.ones(1))
    (path,) = cached()
    whole = path.read_bytes()
    path.unlink()  # not written over: this process has it mapped
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    names = compiles(monkeypatch)
    assert adds(again(monkeypatch)) and names == ["add"]


@pytest.mark.slow
@pytest.mark.parametrize("why", ["read-only", "full", "no folder"])
def test_without_a_cache_it_is_compiled_aside(why, monkeypatch, tmp_path):
    if why == "full":

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    elif why == "read-only":  # root may write anywhere: a file where the folder should be stops root too

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", denied)
    else:
        (tmp_path / "cache").write_text("a file where the folder should be")
    assert adds(native.kernel("add", torch.ones(1)))
    assert why == "no folder" or not cached()


def test_nothing_is_left_in_the_temporary_folder(monkeypatch, tmp_path):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert native.kernel("add", torch.ones(1)) and not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_two_processes_may_compile_at_once(tmp_path):
    code = (
        "import torch; from minift.ops import native, sources; from pathlib import Path;"
        f"sources.folder = lambda: Path({str(sources.folder())!r});"
        "x, y = torch.ones(5), torch.empty(5);"
        "native.kernel('add', x).add(x=x, y=y, by=2.5, n=5); assert y.tolist() == [3.5] * 5"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(3)]
    assert [(r.communicate()[1], r.returncode) for r in runs] == [(b"", 0)] * 3
    assert cached() and all(p.suffix == ".so" for p in cached())


def test_one_reason_for_all_kernels_is_told_once(monkeypatch, capsys):
    """Without a compiler each kernel falls back for the same reason."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = "no C++ compiler was found (looked for no-such-compiler)"
    assert native.use("auto") == f"PyTorch reference ({reason})"
    shutil.copy(sources.folder() / "cpu/add.cpp", sources.folder() / "cpu/other.cpp")
    assert native.load_kernel("add") is None and native.load_kernel("other") is None
    assert not capsys.readouterr().err


def test_where_nothing_can_be_kept_it_is_said_and_kernels_still_work(monkeypatch, tmp_path):
    """As where the home folder cannot be written."""
    (tmp_path / "place").write_text("")  # a file: no folder can be made in it
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "place"))
    monkeypatch.setattr(native, "ThreadPoolExecutor", lambda n: SimpleNamespace(submit=lambda *_: None))
    assert f"for this process alone: {tmp_path}/place/minift/kernels cannot be used" in native.use("auto")
    assert adds(native.load_kernel("add"))


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no compiler", "no C++ compiler was found (looked for no-such-compiler)"),
        ("no source", "add.cpp"),
        ("an error", "cannot compile add.cpp"),
        ("a compiler that fails", "false cannot compile add.cpp (exit code 1)"),
        ("a library that does not load", "does not load"),
    ],
)
def test_where_there_is_no_way_it_is_said_once_and_the_reference_runs(broken, reason, monkeypatch, capsys, tmp_path):
    source = sources.folder() / "cpu/add.cpp"
    if broken == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif broken == "no source":
        source.unlink()
    elif broken == "an error":
        source.write_text(ADD.replace("a->y[i] =", "a->z[i] ="))
    elif broken == "a compiler that fails":
        monkeypatch.setenv("CXX", "false")
    else:
        source.write_text("float missing(double);\n" + ADD.replace("float(a->by)", "missing(a->by)"))
        monkeypatch.setattr(compile, "FLAGS", compile.FLAGS + " -Wl,-z,now")
    assert native.kernel("add", torch.ones(1)) is None and native.kernel("add", torch.ones(1)) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("add runs on its PyTorch reference: ") and reason in said
    monkeypatch.setattr(native, "loaded", {})
    monkeypatch.setattr(native, "making", {})
    with pytest.raises(ValueError, match="--kernels is 'native', but .*; expected auto or reference"):
        native.use("native")
        native.kernel("add", torch.ones(1))


def test_the_modes(monkeypatch):
    names = compiles(monkeypatch)
    assert native.use("reference") == "PyTorch reference (asked for)"
    assert native.kernel("add", torch.ones(1)) is None and not names
    assert native.use("auto").startswith("native on the CPU") and not names
    assert native.use("native").startswith("native on the CPU") and names == ["add"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    compile.compiler.cache_clear()
    assert native.use("auto") == "PyTorch reference (no C++ compiler was found (looked for no-such-compiler))"
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        native.use("native")


def test_what_kernels_do_not_take_goes_to_the_reference():
    x = torch.ones(3)
    assert native.kernel("add", x, None, x)
    for other in (x.double(), x.half(), x.to("meta"), x.bfloat16(), x.int(), x.as_subclass(Odd)):
        assert native.kernel("add", x, other) is None
    assert native.kernel("add", x.double()) is None
    assert native.kernel("add", x.bfloat16()) and native.kernel("add", torch.nn.Parameter(x), x)


class Odd(torch.Tensor):
    """A subclass, whose data_ptr may mean nothing."""


def test_the_compiler_is_the_one_asked_for(monkeypatch, tmp_path):
    log, wrapper = tmp_path / "log", tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nshift\nexec {compile.compiler()[0][0]} "$@"\n')
    wrapper.chmod(0o700)
    compile.compiler.cache_clear()
    monkeypatch.setenv("CXX", f"{wrapper} --first")
    assert adds(native.kernel("add", torch.ones(1)))
    assert all(line.startswith("--first") for line in log.read_text().splitlines())


def test_arguments_are_those_of_the_source():
    (add,) = sources.functions({"add.cpp": ADD}).values()
    assert add.fields == {"x": "P", "y": "P", "by": "d", "n": "q"}
    for source in (ROOT / "kernels/cpu").glob("*.cpp"):
        found = sources.functions(sources.read_sources(source))
        assert len(found) == source.read_text().count('extern "C" void') > 0, source.name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "kernels/cpu").glob("*.cpp") if p.stem != "memory"))
def test_structs_lie_as_the_compiler_lays_them_out(name, tmp_path):
    source = ROOT / f"kernels/cpu/{name}.cpp"
    checks = [f'#include <cstddef>\n#include "{source}"']
    for wanted in sources.functions(sources.read_sources(source)).values():
        checks += [f"static_assert(sizeof({wanted.name}) == {wanted.layout.size});"]
        before = ""
        for field, code in wanted.fields.items():
            offset = struct.calcsize(before + code) - struct.calcsize(code)
            checks += [f"static_assert(offsetof({wanted.name}, {field}) == {offset});"]
            before += code
    (tmp_path / "checks.cpp").write_text("\n".join(checks))
    command = [*compile.compiler()[0], "-std=c++17", "-fsyntax-only", f"-I{ROOT}/kernels", tmp_path / "checks.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode and len(checks) > 3, done.stderr


def test_a_struct_within_a_struct_begins_and_ends_where_c_has_it():
    text = "struct Inner {\n    float a;\n    double b;\n    int32_t c;\n};\n"
    text += "struct Outer {\n    int32_t first;\n    Inner inner;\n    int32_t last;\n};\n"
    content = sources.packed(sources.arguments("Outer", text), dict(first=1, inner=(2.0, 3.0, 4), last=5))
    assert struct.unpack("=i4xf4xdi4xi4x", content) == (1, 2.0, 3.0, 4, 5)


def test_fields_are_set_by_name_and_none_is_forgotten():
    (add,) = sources.functions({"add.cpp": ADD}).values()
    x = torch.ones(2)
    content = sources.packed(add, dict(n=2, x=x, by=0.5, y=None))
    assert struct.unpack("PPdq", content) == (x.data_ptr(), 0, 0.5, 2)
    with pytest.raises(KeyError, match="n"):
        sources.packed(add, dict(x=x, y=None, by=0.5, m=2))
    for given in (dict(x=x, by=0.5, n=2), dict(x=x, y=x, by=0.5, n=2, m=3)):
        with pytest.raises(AssertionError, match="Add has"):
            sources.packed(add, given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arch"),
    [
        ("the one found", "x86-64"),  # SSE2 alone
        ("the one found", "haswell"),  # AVX2
        ("clang++", "x86-64"),
        ("clang++", "haswell"),
        ("aarch64-linux-gnu-g++", "armv8-a"),
    ],
)
def test_every_kernel_compiles_for_other_cpus_and_without_a_warning(command, arch):
    if arch != "armv8-a" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the compilers here make code for another CPU")
    if command != "the one found" and not shutil.which(command):
        pytest.skip(f"no {command}")
    commands = compile.compiler()[0] if command == "the one found" else [command]
    flags = compile.FLAGS.replace("-O3", "-O0").replace("native", arch).replace("-shared", "-S -Wall -Wextra -Werror")
    for source in (ROOT / "kernels/cpu").glob("*.cpp"):
        headers = [f for f in compile.torch_flags(sources.read_sources(source)) if f.startswith("-isystem")]
        command = [*commands, *flags.split(), *headers, f"-I{ROOT}/kernels", "-o", os.devnull, source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode and not done.stderr, done.stderr


@pytest.mark.slow
def test_clangs_vectors_lie_anywhere(monkeypatch):
    """It took references to them to be aligned, and the process died."""
    if not shutil.which("clang++"):
        pytest.skip("no clang++")
    compile.compiler.cache_clear()
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr(sources, "folder", lambda: ROOT / "kernels")
    torch.manual_seed(0)
    x, A, words = torch.randn(5, 64), torch.randn(1025)[1:].view(16, 64), torch.arange(64, dtype=torch.int32)
    results = []
    drop = Drop(words[:5], words, 0.1)
    for mode in ("native", "reference"):
        monkeypatch.setattr(native, "mode", mode)
        h, dx = lora.shrink(x, A, drop), torch.zeros(5, 64)
        results.append([h, dx, lora.spread(x, h, A, dx, drop)])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))


def test_torchs_threads_are_used():
    """torch's own parallel loop is there, and obeys torch.set_num_threads."""
    source = sources.folder() / "cpu/pieces.cpp"
    source.write_text(
        '#include "common.h"\n'
        "struct Pieces {\n    int64_t* starts;\n    int64_t n;\n};\n"
        'extern "C" void pieces(const Pieces* a) {\n'
        "    parallel(a->n, 1, [&](int64_t begin, int64_t end) {\n"
        "        for (int64_t i = begin; i < end; i++) a->starts[i] = begin;\n"
        "    });\n"
        "}\n"
    )
    library, before = native.kernel("pieces", torch.ones(1)), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            starts = torch.full((12,), -1)
            library.pieces(starts=starts, n=12)
            assert len(set(starts.tolist())) == threads and starts.min() == 0
    finally:
        torch.set_num_threads(before)


def test_without_torchs_loop_one_thread_does_all(monkeypatch):
    monkeypatch.setattr(compile, "torch_parallel_for", lambda: None)
    assert adds(native.kernel("add", torch.ones(1)))


@pytest.mark.slow
def test_subnormals_stay_after_loading_every_kernel(monkeypatch):
    monkeypatch.setattr(sources, "folder", lambda: ROOT / "kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    names = sorted(p.stem for p in (ROOT / "kernels/cpu").glob("*.cpp"))
    assert names and all(native.kernel(name, torch.ones(1)) for name in names)
    assert 1e-40 * torch.ones(1).numpy()[0] != 0 and float.fromhex("0x1p-1070") * 1.0 != 0
    assert (torch.full((8,), 1e-40) * 1).min() > 0
    assert gelu_erf(torch.full((8,), 1e-38)).min() > 0  # half of it is subnormal


@pytest.mark.slow
def test_nothing_is_compiled_at_import(tmp_path):
    code = "import minift, minift.cli, minift.training; from minift.ops import native; assert not native.loaded"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not cached()


def test_the_option_takes_the_modes():
    with pytest.raises(ValueError, match="--kernels is 'fast'; expected one of auto, native, reference"):
        TrainConfig(kernels="fast").check()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_is_kept_from_step_to_step():
    """Page faults of 96 MB in six blocks that were there before: hardly any with keep_memory, one a page where memory
    goes back at once, as it does while a model is loaded. (Left alone, glibc does now this and now that.)"""
    code = """
import contextlib, resource, sys, torch
from minift.engine import memory
if sys.argv[1] == "keep": memory.keep_memory()
how = contextlib.nullcontext() if sys.argv[1] == "keep" else memory.returned_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(2**22) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with how:
    for _ in range(4):
        last = faults()
print(last)
"""
    count = {
        how: int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert count["keep"] < 32 <= count["give back"], count  # 48 huge pages at least


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_freed_block_is_found_again():
    """Blocks of 4 MB with smaller ones between that stay: their holes take as many blocks of 4 MB again, but
    one perhaps, and the process does not grow (by torch's own allocator, 11 to 24 MB)."""
    code = """
import torch
from minift.engine import memory
memory.keep_memory()
def resident():  # without the code of libraries, of which more is read as it is called
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
kept = [(torch.ones(2**20), torch.ones(2**16)) for _ in range(24)]
kept = [small for _, small in kept]
before = resident()
again = [torch.ones(2**20) for _ in range(24)]
assert all(t.data_ptr() % 64 == 0 and t.sum() == 2**20 for t in again)
print(resident() - before)
"""

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert float(done.stdout) < 6


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
@pytest.mark.parametrize("seed", [1, 2])
def test_large_blocks_are_kept_and_never_more_than_were_in_use(seed):
    """Blocks of 34 to 90 MB, taken and freed at random: the process holds what they were at once at most, no more.

    Taken in the same order a second time, most of them are there already.
    """
    code = f"""
import random, resource, torch
from minift.engine import memory
memory.keep_memory()
def highest():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
torch.ones(2**25), highest()
before = int(open("/proc/self/statm").read().split()[1]) * 4096
draw = random.Random({seed})
calls = [(draw.randrange(34, 90), draw.randrange(4)) for _ in range(30)]
def go():
    blocks, most = [], 0
    for size, freed in calls:
        blocks.append(torch.ones(size, 2**18))
        most = max(most, sum(b.nbytes for b in blocks))
        if len(blocks) > freed:
            del blocks[: freed + 1]
    return most
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    go()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
most = go()
second = faults()
print(highest() - before, most, second, sum(size for size, _ in calls) * 2**20 // 4096)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    grown, most, faults, pages = map(int, done.stdout.split())
    assert grown < most + (8 << 20)
    assert faults < pages / 2


@pytest.mark.slow
def test_the_profiler_still_sees_memory():
    code = """
import torch
from minift.engine import memory
memory.keep_memory()
with torch.profiler.profile(profile_memory=True) as p:
    x = torch.ones(2**20)
    del x
sizes = [e.self_cpu_memory_usage for e in p.key_averages()]
assert max(sizes) == 2**22, sizes
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# ---- compilers and caches that are none


def script(path: Path, text: str) -> str:
    """An executable shell script; its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("given", ["'c++", 'c++ "'])
def test_a_compiler_that_is_no_command(given, monkeypatch, capsys):
    monkeypatch.setenv("CXX", given)
    assert "which is no command (No closing quotation)" in native.use("auto")
    assert native.load_kernel("add") is None and not capsys.readouterr().err
    with pytest.raises(ValueError, match="--kernels is 'native'"):
        native.use("native")


@pytest.mark.slow
def test_a_compiler_that_never_ends(monkeypatch, tmp_path, capsys):
    """It is waited for once, and not for every kernel."""
    monkeypatch.setattr(compile, "hung", set())
    monkeypatch.setattr(compile, "SECONDS", 6)
    monkeypatch.setenv("CXX", script(tmp_path / "slow", '[ "$1" = --version ] && echo slow && exit; exec sleep 100'))
    began = time.monotonic()
    assert native.load_kernel("add") is None and "did not end within 6 seconds" in capsys.readouterr().err
    native.loaded.clear()
    assert native.load_kernel("add") is None
    assert time.monotonic() - began < 9


@pytest.mark.slow
def test_a_compiler_that_prints_garbage(monkeypatch, tmp_path, capsys):
    """Its words reach the terminal with the control characters taken out, and only the first of a hundred megabytes."""
    lines = r"printf 'error: \033[31mred\007\n'; yes error | head -c 30000000; exit 1"
    monkeypatch.setenv("CXX", script(tmp_path / "loud", rf'[ "$1" = --version ] && printf "v\0331\n" && exit; {lines}'))
    before = peak_memory()
    assert "v\\x1b1" in native.use("auto")
    assert native.load_kernel("add") is None
    said = capsys.readouterr().err
    assert r"error: \x1b[31mred\x07" in said and "\x1b" not in said and len(said) < 1000
    assert peak_memory() - before < 20e6


def test_a_library_that_lacks_its_functions(monkeypatch, tmp_path, capsys):
    """A compiler that makes something else of the source: the reference runs."""
    (tmp_path / "empty.cpp").write_text("")
    command = '[ "$1" = --version ] && exec c++ --version; c++ -shared -o "$(echo "$@" | sed "s/.*-o //; s/ .*//")" '
    monkeypatch.setenv("CXX", script(tmp_path / "wrong", command + str(tmp_path / "empty.cpp")))
    assert native.load_kernel("add") is None
    assert "does not load" in capsys.readouterr().err


def test_a_pipe_in_the_cache_is_passed_over():
    """To read it would wait for ever."""
    assert adds(native.load_kernel("add"))
    (path,) = cached()
    path.unlink()
    os.mkfifo(path, 0o700)
    native.loaded.clear()
    assert adds(native.load_kernel("add"))
