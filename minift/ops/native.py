"""The kernels of `kernels/cpu/`: compiled by the machine's C++ compiler at first use, cached, loaded, called by ctypes.

    lib = native.kernel("gelu", x)          the library of kernels/cpu/gelu.cpp, or None: run the PyTorch reference
    lib.gelu_forward(native.pointer(x), ...)

One operator is one shared object, a C interface over pointers (kernels/README.md). It is kept in the user's cache
folder under a key of all that it was made from, the CPU included, and runs on torch's own threads, by the C symbol
`torch_parallel_for` of libtorch_cpu (torch/csrc/stable/c/shim.h). Nothing happens when this file is imported.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import printable

# never -ffast-math: linking with it makes GCC before 13 turn subnormals off in the whole process
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd -std=c++17 -fPIC -shared"
MODES = ("auto", "native", "reference")
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: None}  # dtypes that kernels take
HERE = CODES.keys() - {torch.float16}  # on the CPU
PLAIN = {Tensor, nn.Parameter}  # kinds of tensor whose data_ptr is their data
C_TYPES = {"*": ctypes.c_void_p, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}

mode = "auto"  # `use` sets it
loaded: dict[str, ctypes.CDLL | None] = {}  # by operator; None: it could not be made, and that was said
making: dict[str, Future] = {}  # by operator: being made in the background
hung: set[str] = set()  # compilers that did not end
SECONDS = 120.0  # that a compiler may take; a kernel takes it one to four


class Unavailable(Exception):
    """Why there is no native kernel, in one line."""


def use(wanted: str, device: torch.device | None = None) -> str:
    """Sets the mode: `auto` falls back to the reference, `native` refuses to, `reference` compiles nothing.

    Returns what will run on the device (None: the CPU), in words. Raises ValueError for another mode, and where
    `native` finds no way.
    """
    global mode
    if wanted not in MODES:
        raise ValueError(f"--kernels is {wanted!r}; expected one of {', '.join(MODES)}")
    mode = wanted
    if mode == "reference":
        return "PyTorch reference (asked for)"
    if device is not None and device.type == "cuda":
        from . import cuda

        return cuda.describe(device)
    try:
        version = compiler()[1]
    except Unavailable as e:
        if mode == "native":
            raise refusal(e) from None
        return f"PyTorch reference ({e})"
    if "attention" not in loaded and "attention" not in making:  # it takes as long as all others: beside them
        making["attention"] = ThreadPoolExecutor(1).submit(build, "attention")
    for source in sorted(sources().glob("cpu/*.cpp"), reverse=True) if mode == "native" else ():
        load(source.stem)
    return f"native on the CPU, compiled at first use ({version})"


def kernel(name: str, *tensors: Tensor | None) -> ctypes.CDLL | None:
    """The library of kernels/cpu/NAME.cpp, if it can work on all these tensors; else None, and the reference runs.

    It takes plain CPU tensors of one dtype: float32, bfloat16, or int32. On CUDA tensors it is that of
    kernels/cuda/NAME.cu (cuda.py), with the same functions. Raises ValueError in mode `native` where it cannot be made.
    """
    if mode == "reference":
        return None
    if tensors[0].is_cuda:
        from . import cuda

        return cuda.kernel(name, *tensors)
    dtype = tensors[0].dtype
    for t in tensors:
        if t is not None and not (t.dtype is dtype and dtype in HERE and t.is_cpu and type(t) in PLAIN):
            return None
    return loaded[name] if name in loaded else load(name)


def pointer(t: Tensor | None) -> int | None:
    """The address of a contiguous tensor's first element; null for None."""
    return None if t is None else t.data_ptr()


def load(name: str) -> ctypes.CDLL | None:
    """Makes or finds the library, once; where that fails says so, once. Raises ValueError in mode `native`."""
    try:
        library = making.pop(name).result() if name in making else build(name)
    except (Unavailable, OSError) as e:  # OSError: no sources, or nowhere to compile
        if mode == "native":
            raise refusal(e) from None
        library = None
        if os.environ.get("RANK", "0") == "0":
            instead = "is left as torch has it" if name == "memory" else "runs on its PyTorch reference"
            print(f"{name} {instead}: {e}", file=sys.stderr)
    loaded[name] = library
    return library


def refusal(why: Exception) -> ValueError:
    """What mode `native` says instead of falling back."""
    return ValueError(f"--kernels is 'native', but {why}; expected auto or reference")


# ---- making one


def build(name: str) -> ctypes.CDLL:
    """The library from the cache, or compiled and put there. Raises Unavailable."""
    folder, stem = cache_folder(), f"{name}-{key(name)}"
    for path in folder.glob(f"{stem}-*.so") if private(folder) else ():
        if private(path) and path.stem == f"{stem}-{digest(path.read_bytes())}":
            try:
                return opened(path, name)
            except OSError:
                continue  # made anew below
    with tempfile.TemporaryDirectory(prefix="minift-") as scratch:
        made = compile_(name, Path(scratch, f"{stem}.so"))
        path = keep(made, folder, stem) or made  # a library stays loaded when its file is deleted
        try:
            return opened(path, name)
        except OSError as e:
            raise Unavailable(f"{path.parent}: the library made there does not load ({e})") from e


def compile_(name: str, out: Path) -> Path:
    """Runs the compiler on one kernel. Raises Unavailable with its first complaint."""
    command = [*compiler()[0], *FLAGS.split(), "-o", str(out), str(sources() / f"cpu/{name}.cpp"), *more_flags(name)]
    code, said = run(command, SECONDS)
    if code or not out.exists():
        lines = said.strip().splitlines() or [f"exit code {code}"]
        complaint = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{command[0]} cannot compile {name}.cpp ({printable(complaint[:300])})")
    return out


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """(exit code, the first of what it said) of a compiler. Raises Unavailable where it does not run, or not end.

    One that hangs is not asked again; one that says a hundred megabytes is not listened to.
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


def more_flags(name: str) -> list[str]:
    """Flags of one source alone."""
    folder = Path(torch.__file__).parent
    return [f"-isystem{folder}/include", f"-L{folder}/lib", "-lc10"] if name == "memory" else []


def keep(made: Path, folder: Path, stem: str) -> Path | None:
    """A copy in the cache folder, written aside and renamed; None where the folder cannot be written or trusted."""
    content = made.read_bytes()
    path, aside = folder / f"{stem}-{digest(content)}{made.suffix}", folder / f"{stem}.{os.getpid()}.tmp"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not private(folder):
            return None
        with open(aside, "wb") as f:
            os.fchmod(f.fileno(), 0o700)
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
        return path
    except OSError:  # read-only or full: this process does without
        with suppress(OSError):
            aside.unlink()
        return None


def private(path: Path) -> bool:
    """Whether a file or folder is this user's and nobody else can write to it: what is loaded from there runs.

    Nothing else than files and folders: to read a pipe would wait for ever.
    """
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def opened(path: Path, name: str) -> ctypes.CDLL:
    """The library with torch's thread pool handed in and the types of its functions set. Raises OSError."""
    library = ctypes.CDLL(str(path))
    try:
        library.set_parallel_for.argtypes, library.set_parallel_for.restype = [ctypes.c_void_p], None
        for function, types in signatures((sources() / f"cpu/{name}.cpp").read_text()).items():
            f = getattr(library, function)
            f.argtypes, f.restype = types, None
    except AttributeError as e:  # it lacks a function
        raise OSError(f"{path}: {e}") from e
    library.set_parallel_for(torch_parallel_for())
    return library


def signatures(source: str) -> dict[str, list]:
    """The ctypes of the arguments of every `extern "C" void f(...)` in a C++ source."""
    found = re.findall(r'^extern "C" void (\w+)\(([^)]*)\)', source, re.MULTILINE)
    return {f: [next(t for word, t in C_TYPES.items() if word in a) for a in args.split(",")] for f, args in found}


@cache
def torch_parallel_for() -> int | None:
    """The address of torch's function that shares a loop out to its threads; None where this torch has none."""
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


# ---- what a library is made from


def sources() -> Path:
    """The folder with cpu/: in the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    return package / "kernels" if (package / "kernels").is_dir() else package.parent / "kernels"


def cache_folder() -> Path:
    """Where libraries are kept between processes."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~"), ".cache")) / "minift" / "kernels"


def key(name: str) -> str:
    """A name for everything that the library depends on: source, headers, flags, compiler, CPU, torch."""
    files = [sources() / f"cpu/{name}.cpp", *sorted((sources() / "cpu").glob("*.h"))]
    command, version = compiler()
    parts = [FLAGS, *command, version, cpu(), *more_flags(name), torch.__version__, *(f.read_text() for f in files)]
    return digest("\0".join(parts).encode())


def digest(content: bytes) -> str:
    """A short name for this content."""
    return hashlib.sha256(content).hexdigest()[:20]


@cache
def cpu() -> str:
    """The CPU's model and what it can do, for -march=native makes code for this one alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    words = ("model", "flags", "CPU", "Features")  # x86, x86, ARM, ARM; also "model name"
    return "\n".join(sorted({line for line in lines if line.startswith(words)}))


@cache
def compiler() -> tuple[list[str], str]:
    """(command, version): that of the environment variable CXX, else c++, g++ or clang++. Raises Unavailable."""
    if os.name != "posix":
        raise Unavailable(f"kernels are compiled on Linux and macOS alone, not on {platform.system()}")
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
