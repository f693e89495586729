"""The kernels of `kernels/cuda/`: compiled by NVRTC at first use, cached, loaded and launched by the CUDA driver.

    lib = cuda.kernel("gelu", x)            kernels/cuda/gelu.cu on x's device, or None: run the PyTorch reference
    lib.gelu_forward(native.pointer(x), ...)

A library has the functions of the CPU's (native.py), with the same arguments, so one autograd function calls either.
NVRTC comes with torch's own wheels: nobody has to install a toolkit, and no header is used. Launches go to torch's
current stream, so a CUDA graph can capture them. Nothing happens when this file is imported.

https://docs.nvidia.com/cuda/nvrtc, https://docs.nvidia.com/cuda/cuda-driver-api
"""

import ctypes
import os
import re
import struct
import sys
import tempfile
from ctypes import byref, c_void_p
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .native import CODES, PLAIN, Unavailable, digest

THREADS = 256  # of every block
OLDEST = (7, 0)  # compute capability
FLAGS = "--std=c++17 -default-device"
FORMATS = {"*": "P", "int64_t": "q", "float": "f", "double": "d"}  # arguments, as `struct` writes them
DRIVER = "libcuda.so.1"
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT

loaded: dict[tuple[str, int], "Library | None"] = {}  # by operator and device; None: there is none, and that was said


class Kernel(NamedTuple):
    """What a source says of one of its kernels."""

    names: tuple[str, ...]  # of the arguments
    layout: struct.Struct  # of the arguments, as C lays them out
    starts: tuple[int, ...]  # where each begins, in bytes
    work: tuple[str, str]  # how many blocks: the first divided by the second; argument names or numbers


def describe(device: torch.device) -> str:
    """What runs on this device, in words. In mode `native` makes every kernel; raises ValueError where one fails."""
    try:
        version, arch = nvrtc()[1], architecture(device)
        driver()
    except Unavailable as e:
        if native.mode == "native":
            raise native.refusal(e) from None
        return f"PyTorch reference ({e})"
    for path in sorted(native.sources().glob("cuda/*.cu")) if native.mode == "native" else ():
        load(path.stem, torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
    return f"native on CUDA {arch}, compiled at first use (NVRTC {version})"


def kernel(name: str, *tensors: Tensor | None) -> "Library | None":
    """The library of kernels/cuda/NAME.cu, if it can work on all these tensors; else None, and the reference runs.

    It takes plain CUDA tensors of one device and dtype: float32, bfloat16, float16, or int32.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    for t in tensors:
        if t is not None and not (t.dtype is dtype and dtype in CODES and t.device == device and type(t) in PLAIN):
            return None
    key = name, device.index
    return loaded[key] if key in loaded else load(name, device)


def load(name: str, device: torch.device) -> "Library | None":
    """Makes or finds the library, once; where that fails says so, once. Raises ValueError in mode `native`."""
    library = None
    if (native.sources() / f"cuda/{name}.cu").exists():
        try:
            library = Library(name, device)
        except (Unavailable, OSError) as e:
            if native.mode == "native":
                raise native.refusal(e) from None
            if os.environ.get("RANK", "0") == "0":
                print(f"{name} runs on its PyTorch reference on CUDA: {e}", file=sys.stderr)
    loaded[name, device.index] = library
    return library


class Library:
    """One .cu on one device. A function of it is a method that takes addresses and numbers, and returns at once."""

    def __init__(self, name: str, device: torch.device):
        """Raises Unavailable, or OSError where there are no sources."""
        content, self.index = cubin(name, architecture(device)), device.index
        self.context, module, number = c_void_p(), c_void_p(), ctypes.c_int()
        with torch.cuda.device(device):
            check(driver().cuDeviceGet(byref(number), device.index))
            check(driver().cuDevicePrimaryCtxRetain(byref(self.context), number))  # the one that torch uses
            check(driver().cuCtxSetCurrent(self.context))
            check(driver().cuModuleLoadData(byref(module), content))
        kernels, found = signatures((native.sources() / f"cuda/{name}.cu").read_text()), {}
        for function, k in kernels.items():
            found[function] = c_void_p(), k
            check(driver().cuModuleGetFunction(byref(found[function][0]), module, function.encode()))
        for function in kernels:
            if not function.endswith("_2"):
                steps = [found[f] for f in (function, f"{function}_2") if f in found]
                setattr(self, function, partial(self.run, steps))

    def run(self, steps: list[tuple[c_void_p, Kernel]], *args) -> None:
        """One function: its kernels one after the other."""
        for function, k in steps:
            if n := blocks(k, args):
                self.launch(function, n, THREADS, packed(k, args))

    def launch(self, function: c_void_p, grid: int, block: int, packed: tuple, shared: int = 0) -> None:
        """Puts a kernel on the current stream of the library's device. Raises RuntimeError."""
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.launch(function, grid, block, packed, shared)
        stream = torch.cuda.current_stream().cuda_stream
        given = function, grid, 1, 1, block, 1, 1, shared, c_void_p(stream), packed[0], None
        code = driver().cuLaunchKernel(*given)
        if code == NO_CONTEXT:  # a thread of autograd's, in which nothing has called CUDA yet
            check(driver().cuCtxSetCurrent(self.context))
            code = driver().cuLaunchKernel(*given)
        check(code, RuntimeError)


def signatures(source: str) -> dict[str, Kernel]:
    """What a CUDA source says of its kernels: the line `// blocks: ...` and the arguments under it."""
    pattern = r'^// blocks: (\w+)(?: / (\w+))?\nextern "C" __global__ void (\w+)\(([^)]*)\)'
    found = {}
    for work, per, function, args in re.findall(pattern, source, re.MULTILINE):
        codes = [next(f for word, f in FORMATS.items() if word in a) for a in args.split(",")]
        starts = tuple(struct.calcsize("".join(codes[: i + 1])) - struct.calcsize(c) for i, c in enumerate(codes))
        names = tuple(re.findall(r"(\w+)\s*(?:,|$)", args))
        found[function] = Kernel(names, struct.Struct("".join(codes)), starts, (work, per or "1"))
    return found


def blocks(k: Kernel, args: tuple) -> int:
    """How many blocks are worth starting; kernels go round, so a limit costs nothing."""
    work, per = (int(word) if word.isdigit() else args[k.names.index(word)] for word in k.work)
    return min(-(-work // per), 1 << 20)


def packed(k: Kernel, args: tuple) -> tuple[ctypes.Array, ctypes.Array]:
    """(addresses of the arguments, the memory they lie in, which has to stay until the launch). None is null."""
    memory = ctypes.create_string_buffer(k.layout.pack(*(0 if a is None else a for a in args)), k.layout.size)
    base = ctypes.addressof(memory)
    return (c_void_p * len(args))(*(base + start for start in k.starts)), memory


# ---- making one


def cubin(name: str, arch: str) -> bytes:
    """The machine code of a source from the cache, or compiled and put there. Raises Unavailable."""
    folder, stem = native.cache_folder(), f"{name}-{arch}-{key(name, arch)}"
    for path in folder.glob(f"{stem}-*.cubin") if native.private(folder) else ():
        if native.private(path) and path.stem == f"{stem}-{digest(content := path.read_bytes())}":
            return content
    with tempfile.TemporaryDirectory(prefix="minift-") as scratch:
        made = Path(scratch, f"{stem}.cubin")
        made.write_bytes(compile_(name, arch))
        native.keep(made, folder, stem)
        return made.read_bytes()


def key(name: str, arch: str) -> str:
    """A name for everything that the machine code depends on."""
    return digest("\0".join([FLAGS, arch, nvrtc()[1], source(name), header()]).encode())


def source(name: str) -> str:
    """The text of kernels/cuda/NAME.cu."""
    return (native.sources() / f"cuda/{name}.cu").read_text()


def header() -> str:
    """The text of what all CUDA sources include."""
    return (native.sources() / "cuda/common.cuh").read_text()


def compile_(name: str, arch: str) -> bytes:
    """Runs NVRTC on one source. Raises Unavailable with its first complaint."""
    lib, program = nvrtc()[0], c_void_p()
    text, headers = source(name).encode(), (ctypes.c_char_p * 1)(header().encode())
    names = (ctypes.c_char_p * 1)(b"common.cuh")
    options = [o.encode() for o in (*FLAGS.split(), f"--gpu-architecture={arch}")]
    lib.nvrtcCreateProgram(byref(program), text, f"{name}.cu".encode(), 1, headers, names)
    try:
        if lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            lines = output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip().splitlines()
            complaint = next((line for line in lines if "error" in line), "no reason given")
            raise Unavailable(f"NVRTC cannot compile {name}.cu for {arch} ({complaint})")
        return output(program, "CUBIN")
    finally:
        lib.nvrtcDestroyProgram(byref(program))


def output(program: c_void_p, what: str) -> bytes:
    """The log or the machine code of a program."""
    lib, size = nvrtc()[0], ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, byref(size))
    memory = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, memory)
    return memory.raw


# ---- what is on this machine


@cache
def nvrtc() -> tuple[ctypes.CDLL, str]:
    """(library, version) of the compiler beside torch, or wherever the system finds it. Raises Unavailable."""
    majors = [torch.version.cuda.split(".")[0]] if torch.version.cuda else ["13", "12"]  # a driver knows torch's
    for name in (f"libnvrtc.so.{major}" for major in majors):
        for path in (*(folder / name for folder in folders() if (folder / name).exists()), name):
            try:
                if isinstance(path, Path):  # which it would look for elsewhere
                    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
                lib, numbers = ctypes.CDLL(str(path)), (ctypes.c_int(), ctypes.c_int())
                lib.nvrtcVersion(*map(byref, numbers))
                return lib, ".".join(str(n.value) for n in numbers)
            except OSError:
                continue
    raise Unavailable(f"NVRTC was not found (looked for libnvrtc.so.{' and .'.join(majors)} beside torch)")


def folders() -> list[Path]:
    """Where pip puts NVIDIA's libraries for torch."""
    packages = Path(torch.__file__).parents[1]
    return [packages / "torch/lib", *sorted(packages.glob("nvidia/*/lib"))]


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver. Raises Unavailable."""
    try:
        lib = ctypes.CDLL(DRIVER)
    except OSError as e:
        raise Unavailable(f"the CUDA driver does not load ({e})") from None
    three, one = [ctypes.c_uint] * 3, ctypes.c_uint
    lib.cuLaunchKernel.argtypes = [c_void_p, *three, *three, one, c_void_p, c_void_p, c_void_p]
    return lib


def architecture(device: torch.device) -> str:
    """sm_90 and the like. Raises Unavailable for a device that is too old."""
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip or found < OLDEST:
        raise Unavailable(f"the device is {'not from NVIDIA' if torch.version.hip else f'older than sm_{OLDEST[0]}0'}")
    return f"sm_{found[0]}{found[1]}"


def check(code: int, error: type[Exception] = Unavailable) -> None:
    """Raises `error` with the driver's words unless the code is 0."""
    if code:
        words = ctypes.c_char_p()
        driver().cuGetErrorString(code, byref(words))
        raise error(f"CUDA error {code} ({(words.value or b'unknown').decode()})")
