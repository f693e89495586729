"""Which device and which dtype a run computes in, and why.

Precision is explicit: trained weights are float32 and are cast to the dtype of the activations where they are used
(layers/); statistics, softmax and loss are float32, and so is a classifier's head. float16 needs a GradScaler, for its
gradients underflow.
"""

import torch

from ..errors import InputError
from ..ops.linear import cpu_bfloat16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """(device, reason) for `--device auto|cpu|cuda`. Raises InputError where cuda is asked for and absent."""
    if wanted == "cpu":
        return torch.device("cpu"), "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if wanted == "cuda":
        raise InputError("--device is 'cuda', but torch finds no CUDA device; expected auto or cpu")
    return torch.device("cpu"), f"no CUDA device; {torch.get_num_threads()} threads"


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, reason) for `--precision auto|fp32|bf16|fp16` on a device."""
    fast, what = native_bf16(device)
    if wanted == "bf16" and not fast:
        return torch.bfloat16, f"asked for: less memory than fp32, and no faster, for {what}"
    if wanted != "auto":
        return DTYPES[wanted], "asked for"
    if fast:
        return torch.bfloat16, f"{what}; --precision fp32 is slower and closer"
    if device.type == "cuda":
        return torch.float32, f"{what} has no bfloat16; --precision fp16 is faster"
    return torch.float32, what


def name_of(dtype: torch.dtype) -> str:
    """What `--precision` calls a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def native_bf16(device: torch.device) -> tuple[bool, str]:
    """(whether the hardware multiplies bfloat16 matrices itself, what it has)."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"CUDA sm_{major}{minor}"
    what = cpu_bfloat16()
    if what:
        return True, f"the CPU has {what}"
    return False, "the CPU has neither AMX nor AVX512-BF16"
