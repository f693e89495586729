"""A frozen base in four bits: PackedLinears whose weights are NF4 codes.

The files are those of bitsandbytes: a tensor `weight` with six more below its name.
"""

import json
import math

import torch
from torch import Tensor

from ..ops import nf4
from . import packed

MARK = "quant_state.bitsandbytes__nf4"


class Packed(packed.PackedLinear):
    """W in 4.127 bits a weight. `weight` are the codes; absmax, nested and mean their scales."""

    BASE = "nf4"
    PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", MARK)
    CHEAP = False  # the matrix is made once more for each micro-batch

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        blocks = -(-in_features * out_features // nf4.BLOCK)
        self.register_buffer("weight", torch.empty(-(-in_features * out_features // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))  # float32 without double quantisation
        self.register_buffer("nested", torch.empty(-(-blocks // nf4.NESTED)))
        self.register_buffer("mean", torch.empty(()))
        self.dtype = torch.float32  # of the matrix that was packed; a file says it

    def pack(self, matrix: Tensor) -> None:
        """Takes a matrix (out, in) as its weight."""
        self.weight, absmax = nf4.quantize(matrix)
        self.absmax, self.nested, self.mean = nf4.compress(absmax)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`, in memory that the next layer will use for its own: use it at once."""
        out = nf4.scratch(self.out_features, self.in_features, dtype, self.weight.device)
        twice = (self.nested, self.mean) if self.absmax.dtype == torch.uint8 else ()
        return nf4.dequantize(self.weight, self.absmax, out, *twice)

    def are_codes(self, shape: tuple) -> bool:
        """Whether a weight in a file has the shape of codes, kept as numbers of 1, 2 or 4 bytes (quant_storage)."""
        is_column = len(shape) == 2 and shape[1] == 1
        return is_column and any(shape[0] * size == len(self.weight) for size in (1, 2, 4))

    def parts(self) -> dict[str, Tensor]:
        """The tensors beside `weight` in a file of bitsandbytes, by what follows the weight's name."""
        shape = [self.out_features, self.in_features]
        state = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": str(self.dtype)[6:], "shape": shape}
        device = self.weight.device
        found = {"absmax": self.absmax, "quant_map": nf4.levels(device)}
        if self.absmax.dtype == torch.uint8:
            state |= {"nested_blocksize": nf4.NESTED, "nested_dtype": "float32", "nested_offset": self.mean.item()}
            found |= {"nested_absmax": self.nested, "nested_quant_map": nf4.dynamic_levels(device)}
        return found | {MARK: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    def receive(self, found: dict[str, Tensor]) -> str:
        """Takes `weight` and its parts from a file; returns what is wrong with them, or nothing."""
        missing = {"weight", "absmax", "quant_map", MARK} - found.keys()
        if missing:
            return f"is in 4 bits, but without {', '.join(sorted(missing))}"
        if found["weight"].is_floating_point():  # bytes, kept as wider numbers (bnb_4bit_quant_storage)
            found = found | {"weight": found["weight"].contiguous().view(torch.uint8).view(-1, 1)}
        try:
            dtype, mean, nested = self.read_state(found[MARK])
            self.check_parts(found, nested)
        except ValueError as e:
            return str(e)

        self.weight = found["weight"].clone()
        self.absmax = found["absmax"].clone()
        self.nested = found["nested_absmax"].clone() if nested else torch.empty(0)
        self.mean = torch.tensor(mean)
        self.dtype = dtype
        return ""

    def read_state(self, mark: Tensor) -> tuple[torch.dtype, float, bool]:
        """(dtype of the original, mean of the scales, whether these are packed too) of a file's quant_state.

        Raises ValueError.
        """
        try:
            state = json.loads(bytes(mark.tolist()))
            nested = "nested_offset" in state
            dtype = getattr(torch, state["dtype"])
            mean = float(state.get("nested_offset", 0))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            raise ValueError(f"has a quant_state that cannot be read ({type(e).__name__}: {e})") from e
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or not math.isfinite(mean):
            found = f"has dtype {state['dtype']!r} and nested_offset {mean} in its quant_state"
            raise ValueError(f"{found}; expected finite numbers")
        expected = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": [self.out_features, self.in_features]}
        if nested:
            expected |= {"nested_blocksize": nf4.NESTED, "nested_dtype": "float32"}
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(f"has {key} {state.get(key)!r} in its quant_state; expected {value!r}")
        return dtype, mean, nested

    def check_parts(self, found: dict[str, Tensor], nested: bool) -> None:
        """Raises ValueError where a part has another shape or dtype, or is another table. nested: as in read_state."""
        scales = torch.uint8 if nested else torch.float32
        like = {
            "weight": torch.empty_like(self.weight, device="meta"),
            "absmax": torch.empty(len(self.absmax), dtype=scales, device="meta"),
            "quant_map": nf4.levels(torch.device("cpu")),
        }
        if nested:
            like["nested_absmax"] = torch.empty_like(self.nested, device="meta")
            like["nested_quant_map"] = nf4.dynamic_levels(torch.device("cpu"))
        for part, expected in like.items():
            wanted = f"expected {tuple(expected.shape)} {expected.dtype}"
            tensor = found.get(part)
            if tensor is None:
                raise ValueError(f"has a part {part} that is missing; {wanted}")
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(f"has a part {part} that is {tuple(tensor.shape)} {tensor.dtype}; {wanted}")
            # 1e-6: the second table is off by a unit in the last place where the file was made on a CPU without
            # fused multiply-add (ops/nf4.py, evenly)
            if not expected.is_meta and not torch.allclose(tensor, expected, rtol=1e-6, atol=0):
                raise ValueError(f"has a {part} other than that of NF4")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"has a {part} with numbers that are not finite")


def quantization_config(skipped: list[str]) -> dict:
    """quantization_config in config.json, for transformers; `skipped` are linear layers that are not in four bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def reads(settings: dict) -> bool:
    """Whether a quantization_config is NF4's."""
    return (settings.get("quant_method"), settings.get("bnb_4bit_quant_type")) == ("bitsandbytes", "nf4")
