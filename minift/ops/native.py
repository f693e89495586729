"""Which code runs an operator: its kernel in C++ or CUDA, or its PyTorch reference.

    lib = native.kernel("gelu", x)          of kernels/cpu/gelu.cpp or kernels/cuda/gelu.cu; None: run the reference
    lib.gelu_forward(x=x, y=y, n=x.numel(), tanh=True, dtype=native.CODES[x.dtype])

A kernel is made at first use (compile.py, cuda.py). Where that fails, the reason is printed once and the reference
runs, unless --kernels is `native`. Nothing happens when this file is imported.
"""

import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from . import compile, cuda, sources
from .sources import PLAIN, Unavailable

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # kernels/shared.h
ON_CPU = {torch.float32, torch.bfloat16, torch.int32}  # dtypes that kernels take
ON_CUDA = ON_CPU | {torch.float16}
CPU = torch.device("cpu")
Library = compile.Library | cuda.Library

mode = "auto"  # `use` sets it
in_order: dict[int, Tensor] = {}  # where sums of floats keep to one order, as ops/in_order.py sets it; empty elsewhere
loaded: dict[tuple[str, torch.device], Library | None] = {}  # None: it could not be made, and that was said
told: set[str] = set()  # reasons for a reference to run: the same for every kernel where there is no compiler
making: dict[str, Future] = {}  # by operator: being compiled for the CPU in the background
watch: Callable[[str, Library], Library] | None = None  # what measure/ledger.py puts before a kernel while it looks on


def use(wanted: str, device: torch.device = CPU) -> str:
    """Sets the mode: `auto` falls back to the reference, `native` refuses to, `reference` compiles nothing.

    Returns what will run on the device, in words. Raises ValueError where `native` finds no way.
    """
    global mode
    mode = wanted
    if mode == "reference":
        return "PyTorch reference (asked for)"
    try:
        if device.type == "cuda":
            what = cuda.describe_device(device)
        else:
            when = "at first use"
            if not compile.keeps():
                when = f"for this process alone: {compile.cache_folder()} cannot be used"
            what = f"native on the CPU, compiled {when} ({compile.compiler()[1]})"
    except Unavailable as e:
        if mode == "native":
            raise refusal(e) from None
        told.add(str(e))
        return f"PyTorch reference ({e})"

    # attention takes the compiler as long as all others together: it begins at once, beside them
    if device.type == "cpu" and ("attention", CPU) not in loaded and "attention" not in making:
        making["attention"] = ThreadPoolExecutor(1).submit(compile.build, "attention")
    if mode == "native":
        make_all(device)
    return what


def make_all(device: torch.device) -> None:
    """Makes every kernel there is for the device. Raises ValueError where one fails."""
    pattern = "cpu/*.cpp"
    if device.type == "cuda":
        pattern = "cuda/*.cu"
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    for path in sorted(sources.folder().glob(pattern), reverse=True):  # so attention is the last that is waited for
        load_kernel(path.stem, device)


def kernel(name: str, *tensors: Tensor | None) -> Library | None:
    """The functions of the kernel NAME, if it can work on all these tensors; else None, and the reference runs.

    It takes plain tensors on one device and of one dtype: float32, bfloat16, or int32; on CUDA float16 too. Raises
    ValueError in mode `native` where it cannot be made. On the meta device it is the CPU's, while somebody looks on.
    """
    if mode == "reference":
        return None
    first = tensors[0]
    dtype = first.dtype
    on_cpu = first.is_cpu
    for t in tensors:
        if t is not None and not (t.dtype is dtype and t.is_cpu is on_cpu and type(t) in PLAIN):
            return None
    if on_cpu or watch is not None and first.is_meta:
        device = CPU
        fits = dtype in ON_CPU
    else:
        device = first.device
        fits = dtype in ON_CUDA and device.type == "cuda"
        fits = fits and all(t is None or t.device == device for t in tensors)
    if not fits:
        return None

    if (name, device) not in loaded:
        load_kernel(name, device)
    library = loaded[name, device]
    if library is not None and watch is not None:
        library = watch(name, library)
    return library


def load_kernel(
    name: str, device: torch.device = CPU, instead: str = "runs on its PyTorch reference"
) -> Library | None:
    """Makes the kernel, or finds it in the cache; None where there is none for this device, or where that fails.

    A failure is told once, with what happens instead. Raises ValueError for it in mode `native`.
    """
    try:
        if device.type == "cuda":
            library = cuda.Library(name, device) if cuda.source(name).exists() else None
        elif name in making:
            library = making.pop(name).result()
        else:
            library = compile.build(name)
    except (Unavailable, OSError) as e:  # OSError: no sources, or nowhere to compile
        if mode == "native":
            raise refusal(e) from None
        library = None
        if os.environ.get("RANK", "0") == "0" and str(e) not in told:
            told.add(str(e))
            where = " on CUDA" if device.type == "cuda" else ""
            print(f"{name} {instead}{where}: {e}", file=sys.stderr)
    loaded[name, device] = library
    return library


def refusal(why: Exception) -> ValueError:
    """What mode `native` says instead of falling back."""
    return ValueError(f"--kernels is 'native', but {why}; expected auto or reference")
