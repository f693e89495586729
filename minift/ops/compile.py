"""The kernels of `kernels/cpu/`: compiled by the machine's C++ compiler at first use, cached, loaded by ctypes.

    lib = compile.build("gelu")             the library of kernels/cpu/gelu.cpp; raises Unavailable
    lib.gelu_forward(x=x, y=y, n=x.numel(), tanh=True, dtype=0)

One operator is one shared object with a C interface (kernels/README.md). It is kept in the user's cache folder under a
key of all that it was made from, the CPU included, and runs on torch's own threads, by the C symbol
`torch_parallel_for` of libtorch_cpu (torch/csrc/stable/c/shim.h). cuda.py keeps what it makes in the same folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch

from .. import files
from ..errors import printable
from . import sources
from .sources import Arguments, Unavailable, packed

# never -ffast-math: linking with it makes GCC before 13 turn subnormals off in the whole process
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd -std=c++17 -fPIC -shared"
SECONDS = 120.0  # that a compiler may take; a kernel takes it one to four

hung: set[str] = set()  # compilers that did not end


class Library:
    """One kernel. A function of it is a method that takes the fields of its struct by name."""

    on_cuda = False

    def __init__(self, path: Path, texts: dict[str, str]):
        """path: the shared object. Raises OSError where it does not load or lacks a function."""
        library = ctypes.CDLL(str(path))
        try:
            library.set_parallel_for(ctypes.c_void_p(torch_parallel_for()))
            for name, wanted in sources.functions(texts).items():
                function = getattr(library, name)
                function.argtypes = [ctypes.c_char_p] if wanted else []  # the struct, as bytes
                function.restype = None
                setattr(self, name, partial(call, function, wanted) if wanted else function)
        except AttributeError as e:
            raise OSError(f"{path}: {e}") from e


def call(function: Callable, wanted: Arguments, /, **given) -> None:
    """Calls the C function, which takes a struct, with the struct's fields by name."""
    function(packed(wanted, given))


# ---- making one


def build(name: str) -> Library:
    """The kernel from the cache, or compiled and put there. Raises Unavailable, or OSError where there is no source."""
    texts = sources.read_sources(source(name))
    flags = [*FLAGS.split(), "-I", str(sources.folder()), *torch_flags(texts)]
    stem = f"{name}-{key(texts)}"
    for path, _ in kept(stem, ".so"):
        with suppress(OSError):  # then it is made anew below
            return Library(path, texts)

    with tempfile.TemporaryDirectory(prefix="minift-") as scratch:
        made = Path(scratch, f"{stem}.so")
        compile_(name, flags, made)
        path = keep(made.read_bytes(), stem, ".so") or made  # a library stays loaded when its file is deleted
        try:
            return Library(path, texts)
        except OSError as e:
            raise Unavailable(f"{path.parent}: the library made there does not load ({e})") from e


def source(name: str) -> Path:
    """kernels/cpu/NAME.cpp."""
    return sources.folder() / f"cpu/{name}.cpp"


def torch_flags(texts: dict[str, str]) -> list[str]:
    """Flags of a source that includes headers of torch."""
    if not any("#include <c10/" in text for text in texts.values()):
        return []
    folder = Path(torch.__file__).parent
    return [f"-isystem{folder}/include", f"-L{folder}/lib", "-lc10"]


def key(texts: dict[str, str]) -> str:
    """A name for everything that a library depends on: source, headers, flags, compiler, CPU, torch."""
    command, version = compiler()
    parts = [FLAGS, *torch_flags(texts), *command, version, cpu(), torch.__version__, *texts.values()]
    return digest("\0".join(parts).encode())


def compile_(name: str, flags: list[str], out: Path) -> None:
    """Runs the compiler on one kernel. Raises Unavailable with its first complaint."""
    command = compiler()[0]
    code, said = run([*command, "-o", str(out), str(source(name)), *flags], SECONDS)
    if code or not out.exists():
        lines = said.strip().splitlines() or [f"exit code {code}"]
        complaint = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{command[0]} cannot compile {name}.cpp ({printable(complaint[:300])})")


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """(exit code, the first of what it said) of a compiler. Raises Unavailable where it does not run, or does not end.

    One that hangs is not asked again, and of one that prints a hundred megabytes only the first are read.
    """
    if command[0] in hung:
        raise Unavailable(f"{command[0]} did not end within {seconds:.0f} seconds")
    try:
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
            )
            output.seek(0)
            return done.returncode, output.read(1 << 16).decode(errors="replace")
    except subprocess.TimeoutExpired as e:
        hung.add(command[0])
        raise Unavailable(f"{command[0]} did not end within {seconds:.0f} seconds") from e
    except OSError as e:  # it is no program, or there is no temporary folder
        raise Unavailable(f"{command[0]} does not run ({e})") from e


@cache
def compiler() -> tuple[list[str], str]:
    """(command, version): that of the environment variable CXX, else c++, g++ or clang++. Raises Unavailable."""
    given = os.environ.get("CXX", "")
    try:
        asked = shlex.split(given)
    except ValueError as e:
        raise Unavailable(f"CXX is {given!r}, which is no command ({e})") from e
    for command in [asked] if asked else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            _, said = run([*command, "--version"], SECONDS / 6)
            lines = said.splitlines() or ["no version"]
            return command, printable(lines[0][:200])
    raise Unavailable(f"no C++ compiler was found (looked for {' '.join(asked) or 'c++, g++, clang++'})")


@cache
def cpu() -> str:
    """The CPU's model and what it can do: -march=native makes code for this one alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    words = ("model", "flags", "CPU", "Features")  # x86, x86, ARM, ARM; also "model name"
    return "\n".join(sorted({line for line in lines if line.startswith(words)}))


@cache
def torch_parallel_for() -> int | None:
    """The address of torch's function that shares a loop out to its threads; None where this torch has none."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        with suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value
    return None


# ---- the cache, for C++ and CUDA


def cache_folder() -> Path:
    """Where libraries are kept between processes."""
    return files.cache_folder("kernels")


def keeps() -> bool:
    """Whether there is, or could be made, a cache folder that can be written and trusted."""
    with suppress(OSError):
        files.make_private(cache_folder())
        return os.access(cache_folder(), os.W_OK)
    return False


def kept(stem: str, suffix: str) -> Iterator[tuple[Path, bytes]]:
    """(path, content) of what `keep` put there under this stem, if it is whole and nobody else can write to it."""
    folder = cache_folder()
    if not files.private(folder):
        return
    for path in folder.glob(f"{stem}-*{suffix}"):
        if files.private(path):
            content = path.read_bytes()
            if path.stem == f"{stem}-{digest(content)}":
                yield path, content


def keep(content: bytes, stem: str, suffix: str) -> Path | None:
    """A file in the cache folder, written aside and renamed; None where the folder cannot be written or trusted."""
    path = cache_folder() / f"{stem}-{digest(content)}{suffix}"
    try:
        files.make_private(path.parent)
        with files.replaced(path) as file:
            file.write(content)
        path.chmod(0o700)  # whatever the one that it replaces had
        return path
    except OSError:  # read-only, full or not this user's alone: this process does without
        return None


def digest(content: bytes) -> str:
    """A short name for this content."""
    return hashlib.sha256(content).hexdigest()[:20]
