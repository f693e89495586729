"""A frozen base in eight bits, with a scale for each row: PackedLinears whose products are those of int8 matrices.

Files are those of bitsandbytes' LLM.int8(): the codes, `SCB` with the largest |w| of each row, and `weight_format`, the
order in memory, of which the one by rows is read and written.
"""

import torch
from torch import Tensor

from ..ops import int8
from . import packed

MARK = "SCB"


class Packed(packed.PackedLinear):
    """W in int8. `weight` are the codes, absmax the largest |w| of each row."""

    BASE = "int8"
    PARTS = (MARK, "weight_format")
    EXACT = True  # sums of int8's products are integers
    RECORDABLE = False  # whether something is kept apart is asked of the device

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("absmax", torch.empty(out_features))

    def pack(self, matrix: Tensor) -> None:
        """Takes a matrix (out, in) as its weight."""
        self.weight, self.absmax = int8.quantize(matrix)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`."""
        return int8.dequantize(self.weight, self.absmax, dtype)

    def products(self) -> int8.Products:
        """The products with W."""
        return int8.Products(self.weight, self.absmax)

    def parts(self) -> dict[str, Tensor]:
        """The tensors beside `weight` in a file of bitsandbytes."""
        return {MARK: self.absmax, "weight_format": torch.zeros((), dtype=torch.uint8)}

    @staticmethod
    def part_name(weight: str, part: str) -> str:
        """What a file calls a part of the weight of that name: it stands beside it, not below."""
        return f"{weight.removesuffix('weight')}{part}"

    def are_codes(self, shape: tuple) -> bool:
        """Whether a weight in a file is codes. They have the matrix's shape, so config.json has to say it."""
        return self.is_packed_in_file

    def receive(self, found: dict[str, Tensor]) -> str:
        """Takes `weight` and its parts from a file; returns what is wrong with them, or nothing."""
        if MARK not in found or "weight" not in found:
            missing = "weight" if MARK in found else MARK
            return f"is in 8 bits, but without {missing}"
        order = found.get("weight_format", torch.zeros(()))
        if order.numel() != 1 or order.item() != 0:
            return f"has weight_format {order.tolist()}; expected 0, codes in rows"
        for name, like in (("weight", self.weight), (MARK, self.absmax)):
            tensor = found[name]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                expected = f"{tuple(like.shape)} {like.dtype}"
                return f"has a {name} that is {tuple(tensor.shape)} {tensor.dtype}; expected {expected}"
        absmax = found[MARK]
        if not absmax.isfinite().all() or (absmax < 0).any():
            return f"has a {MARK} with numbers that are negative or not finite"
        self.weight = found["weight"].clone()
        self.absmax = absmax.clone()
        return ""


def quantization_config(skipped: list[str]) -> dict:
    """quantization_config in config.json, for transformers; `skipped` are linear layers that are not in eight bits."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
    }


def reads(settings: dict) -> bool:
    """Whether a quantization_config is LLM.int8()'s."""
    return settings.get("quant_method") == "bitsandbytes" and settings.get("load_in_8bit") is True
