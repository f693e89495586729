"""What the process does with memory that is free: glibc's heap, mapped files."""

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..ops import native
from ..ops.linear import keep_few_products


def keep_memory() -> None:
    """Makes glibc keep what is freed, for the next step, instead of giving it back to the kernel.

    Otherwise every step pays for its activations and gradients in page faults. What is kept must also be found again,
    which use_malloc sees to. Another C library is left as it is.
    """
    keep_few_products()
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free at the heap's end
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD at its limit; larger blocks would leave holes in the heap
    if platform.libc_ver()[0] == "glibc" and native.mode != "reference":
        use_malloc()


@cache
def use_malloc() -> None:
    """Makes torch take its memory on the CPU from malloc, whose holes are found again (kernels/cpu/memory.cpp)."""
    library = native.load_kernel("memory", instead="is left as torch has it")
    if library is not None:
        library.use_malloc()


@contextmanager
def returned_memory() -> Iterator[None]:
    """Makes glibc give back what is freed at once, while a checkpoint streams in.

    Otherwise the pieces of each tensor leave holes in the heap, and the next tensor goes beside them.
    """
    mallopt(-3, 2**17)
    try:
        yield
    finally:
        mallopt(-3, 2**25)


def trim() -> None:
    """Gives back all that is kept for later, once."""
    library = native.loaded.get(("memory", native.CPU))
    if library is not None:
        library.forget_large_blocks()
    with suppress(OSError, AttributeError):
        process().malloc_trim(0)


def available(device: torch.device) -> int:
    """Bytes that a process may still take there: of the machine, and of the control groups that the process is in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for folder in control_groups():
        for limit, used, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError):  # "max" is no number
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                # files that were read count as used, and make room where it is needed
                stat = (folder / "memory.stat").read_text().split()
                found.append(left + int(stat[stat.index(inactive) + 1]))
    return max(0, min(found, default=0))


def control_groups() -> list[Path]:
    """The folders of all control groups that may limit the memory of this process, in either version of them."""
    root = Path("/sys/fs/cgroup")
    found = [root, root / "memory"]  # what a container sees of its own
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():  # 4:memory:/a/b, or 0::/a/b
            _, controllers, path = line.split(":", 2)
            top = root / "memory" if controllers == "memory" else root
            if controllers in ("memory", ""):
                folder = top / path.strip("/")
                found += [folder, *folder.parents]
    return [folder for folder in dict.fromkeys(found) if folder.is_relative_to(root)]


def mapping(tensor: Tensor) -> range:
    """The addresses of the mapped file that a tensor lies in; empty where it lies elsewhere, or /proc does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():  # 7f00-7fff rw-p offset device inode path
            begin, end = (int(text, 16) for text in line.partition(" ")[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return range(begin, end) if line.split()[4] != "0" else range(0)
    return range(0)


def forget(tensor: Tensor, place: range) -> None:
    """Gives back the memory of a tensor in the mapped file at `place`; its next use reads the file again."""
    page = mmap.PAGESIZE
    begin, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if begin in place and begin < end <= place.stop:  # elsewhere, in memory without a file, that would be zeros
        process().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


@cache
def process() -> ctypes.CDLL:
    """The functions that are in the process already, libc's among them."""
    return ctypes.CDLL(None)


def mallopt(option: int, value: int) -> None:
    """Sets one of glibc's numbers; nothing where there is none."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
