"""The kernels of `kernels/cuda/`: compiled by NVRTC at first use, cached, loaded and launched by the CUDA driver.

    lib = cuda.Library("gelu", x.device)    kernels/cuda/gelu.cu on x's device; raises Unavailable
    lib.gelu_forward(x=x, y=y, n=x.numel(), tanh=True, dtype=1)

A library has the functions of the CPU's (compile.py), with the same arguments, so one autograd function calls either.
NVRTC comes with torch's own wheels: nobody has to install a toolkit, and none of its headers is used. Launches go to
torch's current stream, so a CUDA graph can capture them.

https://docs.nvidia.com/cuda/nvrtc, https://docs.nvidia.com/cuda/cuda-driver-api
"""

import ctypes
import re
from contextlib import suppress
from ctypes import byref, c_void_p
from functools import cache, partial
from pathlib import Path

import torch

from . import sources
from .compile import digest, keep, kept
from .sources import Arguments, Unavailable, packed

THREADS = 256  # of every block
MOST_BLOCKS = 1 << 20
OLDEST = (7, 0)  # compute capability
FLAGS = "--std=c++17 -default-device"
DRIVER = "libcuda.so.1"
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def describe_device(device: torch.device) -> str:
    """What runs on this device, in words. Raises Unavailable where no kernel can be made."""
    version, arch = nvrtc()[1], architecture(device)
    driver()
    return f"native on CUDA {arch}, compiled at first use (NVRTC {version})"


class Library:
    """One .cu on one device. A function of it is a method that takes the fields of its struct by name.

    It returns at once: it launches its kernel, and then the kernel of the same name with _2 behind it, if there is one.
    """

    on_cuda = True

    def __init__(self, name: str, device: torch.device):
        """Raises Unavailable, or OSError where there are no sources."""
        texts = sources.read_sources(source(name))
        content = cubin(name, texts, architecture(device))
        self.index = device.index
        self.context, module, number = c_void_p(), c_void_p(), ctypes.c_int()
        with torch.cuda.device(device):
            check_call(driver().cuDeviceGet(byref(number), device.index))
            check_call(driver().cuDevicePrimaryCtxRetain(byref(self.context), number))  # the one that torch uses
            check_call(driver().cuCtxSetCurrent(self.context))
            check_call(driver().cuModuleLoadData(byref(module), content))

        work = workloads(texts[f"{name}.cu"])
        offered = sources.functions(texts)
        found = {}
        for function in offered:
            address = c_void_p()
            check_call(driver().cuModuleGetFunction(byref(address), module, function.encode()))
            found[function] = address, *work[function]
        for function, wanted in offered.items():
            if not function.endswith("_2"):
                steps = [found[f] for f in (function, f"{function}_2") if f in found]
                setattr(self, function, partial(self.run, steps, wanted))

    def run(self, steps: list[tuple[c_void_p, str, str]], wanted: Arguments, /, **given) -> None:
        """One function: its kernels one after the other."""
        arguments = ctypes.create_string_buffer(packed(wanted, given), wanted.layout.size)
        for function, total, per in steps:
            if n := blocks(given, total, per):
                self.launch(function, n, arguments)

    def launch(self, function: c_void_p, grid: int, arguments: ctypes.Array) -> None:
        """Puts a kernel on the current stream of the library's device. Raises RuntimeError."""
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.launch(function, grid, arguments)
        stream = c_void_p(torch.cuda.current_stream().cuda_stream)
        addresses = (c_void_p * 1)(ctypes.addressof(arguments))  # of all arguments: one struct
        given = function, grid, 1, 1, THREADS, 1, 1, 0, stream, addresses, None
        code = driver().cuLaunchKernel(*given)
        if code == NO_CONTEXT:  # a thread of autograd's, in which nothing has called CUDA yet
            check_call(driver().cuCtxSetCurrent(self.context))
            code = driver().cuLaunchKernel(*given)
        check_call(code, RuntimeError)


def workloads(source: str) -> dict[str, tuple[str, str]]:
    """How many blocks each kernel of a source is worth, as its line `// blocks: TOTAL / PER` says it."""
    pattern = r'^// blocks: (\w+)(?: / (\w+))?\nextern "C" __global__ void (\w+)'
    found = re.findall(pattern, source, re.MULTILINE)
    return {function: (total, per or "1") for total, per, function in found}


def blocks(given: dict, total: str, per: str) -> int:
    """How many blocks are worth starting: total / per, two numbers or names of fields.

    Kernels go round, so a limit costs nothing.
    """
    total, per = (int(word) if word.isdigit() else given[word] for word in (total, per))
    return min(-(-total // per), MOST_BLOCKS)


# ---- making one


def source(name: str) -> Path:
    """kernels/cuda/NAME.cu."""
    return sources.folder() / f"cuda/{name}.cu"


def cubin(name: str, texts: dict[str, str], arch: str) -> bytes:
    """The machine code of a source from the cache, or compiled and put there. Raises Unavailable."""
    key = digest("\0".join([FLAGS, arch, nvrtc()[1], *texts.values()]).encode())
    stem = f"{name}-{arch}-{key}"
    for _, content in kept(stem, ".cubin"):
        return content
    content = compile_(name, texts, arch)
    keep(content, stem, ".cubin")
    return content


def compile_(name: str, texts: dict[str, str], arch: str) -> bytes:
    """Runs NVRTC on one source, with its headers. Raises Unavailable with its first complaint."""
    lib, program = nvrtc()[0], c_void_p()
    file, *headers = texts
    contents = (ctypes.c_char_p * len(headers))(*(texts[h].encode() for h in headers))
    names = (ctypes.c_char_p * len(headers))(*(h.encode() for h in headers))
    options = [o.encode() for o in (*FLAGS.split(), f"--gpu-architecture={arch}")]
    lib.nvrtcCreateProgram(byref(program), texts[file].encode(), file.encode(), len(headers), contents, names)
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
    majors = ["13", "12"]
    if torch.version.cuda:
        majors = [torch.version.cuda.split(".")[0]]  # the driver knows torch's
    for name in (f"libnvrtc.so.{major}" for major in majors):
        for path in (*(folder / name for folder in folders() if (folder / name).exists()), name):
            with suppress(OSError):
                if isinstance(path, Path):  # which it would look for elsewhere
                    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
                lib, numbers = ctypes.CDLL(str(path)), (ctypes.c_int(), ctypes.c_int())
                lib.nvrtcVersion(*map(byref, numbers))
                return lib, ".".join(str(n.value) for n in numbers)
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


def check_call(code: int, error: type[Exception] = Unavailable) -> None:
    """Raises `error` with the driver's words unless the code is 0."""
    if code:
        words = ctypes.c_char_p()
        driver().cuGetErrorString(code, byref(words))
        raise error(f"CUDA error {code} ({(words.value or b'unknown').decode()})")
