"""A frozen base in four bits: linear layers whose weights are NF4 codes in plain buffers.

    quantize(model)             a loaded model's layers, in place
    load(..., base="nf4")       the same while it loads: each weight is packed as it arrives

Heads, the pooler and embeddings stay as they are unless named. The files are those of bitsandbytes (parts, receive): a
tensor `weight` with six more beside it (transformers loads them with bitsandbytes installed).
"""

import json
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import nf4
from ..ops.dropout import SILENT, Noise
from . import Linear

STATE = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)  # beside `weight` in a file


class NF4Linear(nn.Module):
    """y = x W^T + b with W in 4.127 bits a weight. `weight` are the codes; absmax, nested and mean their scales."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        blocks = -(-in_features * out_features // nf4.BLOCK)
        self.register_buffer("weight", torch.empty(-(-in_features * out_features // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))  # float32 without double quantisation
        self.register_buffer("nested", torch.empty(-(-blocks // nf4.NESTED)))
        self.register_buffer("mean", torch.empty(()))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
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

    def forward(self, x: Tensor, noise: Noise = SILENT) -> Tensor:
        """x (N, in_features) -> (N, out_features), in x's dtype."""
        return nf4.frozen_linear(x, self.bias, self.matrix)

    def parts(self) -> dict[str, Tensor]:
        """The tensors beside `weight` in a file of bitsandbytes, by what follows the weight's name."""
        shape = [self.out_features, self.in_features]
        state = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "dtype": str(self.dtype)[6:], "shape": shape}
        device = self.weight.device
        found = {"absmax": self.absmax, "quant_map": nf4.levels(device)}
        if self.absmax.dtype == torch.uint8:
            state |= {"nested_blocksize": nf4.NESTED, "nested_dtype": "float32", "nested_offset": self.mean.item()}
            found |= {"nested_absmax": self.nested, "nested_quant_map": nf4.dynamic_levels(device)}
        return found | {STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    def receive(self, found: dict[str, Tensor]) -> str:
        """Takes `weight` and its parts from a file; returns what is wrong with them, or nothing."""
        missing = {"weight", "absmax", "quant_map", STATE} - found.keys()
        if missing:
            return f"is in 4 bits, but without {', '.join(sorted(missing))}"
        try:
            state = json.loads(bytes(found[STATE].tolist()))
            want = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": [self.out_features, self.in_features]}
            if nested := "nested_offset" in state:
                want |= {"nested_blocksize": nf4.NESTED, "nested_dtype": "float32"}
            dtype, mean = getattr(torch, state["dtype"]), float(state.get("nested_offset", 0))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
            return f"has a quant_state that cannot be read ({type(e).__name__}: {e})"
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or not math.isfinite(mean):
            return f"has dtype {state['dtype']!r} and nested_offset {mean} in its quant_state; expected finite numbers"
        for key, value in want.items():
            if state.get(key) != value:
                return f"has {key} {state.get(key)!r} in its quant_state; expected {value!r}"
        if found["weight"].is_floating_point():  # bytes, kept as wider numbers (bnb_4bit_quant_storage)
            found = found | {"weight": found["weight"].contiguous().view(torch.uint8).view(-1, 1)}
        blocks = len(self.absmax)
        like = {
            "weight": torch.empty_like(self.weight, device="meta"),
            "absmax": torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta"),
            "quant_map": nf4.levels(torch.device("cpu")),
        }
        if nested:
            like["nested_absmax"] = torch.empty_like(self.nested, device="meta")
            like["nested_quant_map"] = nf4.dynamic_levels(torch.device("cpu"))
        for part, expected in like.items():
            tensor = found.get(part)
            if tensor is None or tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                is_ = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
                return f"has a part {part} that is {is_}; expected {tuple(expected.shape)} {expected.dtype}"
            # 1e-6: the second table is off by a unit in the last place where the file was made on a CPU without
            # fused multiply-add (ops/nf4.py, evenly)
            if not expected.is_meta and not torch.allclose(tensor, expected, rtol=1e-6, atol=0):
                return f"has a {part} other than that of NF4"
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"has a {part} with numbers that are not finite"
        self.weight, self.absmax, self.dtype = found["weight"].clone(), found["absmax"].clone(), dtype
        self.nested = found["nested_absmax"].clone() if nested else torch.empty(0)
        self.mean = torch.tensor(mean)
        return ""


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


def has_packed_layers(model: nn.Module) -> bool:
    """Whether any layer of a model is in four bits."""
    return any(isinstance(module, NF4Linear) for module in model.modules())


def linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """(name, layer) of the layers that are quantised by default: every Linear of the body, also inside an adapter."""
    return ((f"body.{name}", m) for name, m in model.body.named_modules() if isinstance(m, Linear))


def swap(model: nn.Module, name: str) -> NF4Linear:
    """Puts an NF4Linear without content where the Linear called `name` is; the bias goes over."""
    old = model.get_submodule(name)
    with torch.device("meta"):
        new = NF4Linear(old.in_features, old.out_features, old.bias is not None)
    if old.bias is not None:
        new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
    model.set_submodule(name, new)
    return new


def quantize(model: nn.Module) -> nn.Module:
    """Packs the linear layers of the model's body into NF4, in place; they no longer learn. Returns the model."""
    for name, layer in list(linears(model)):
        weight = layer.weight.detach()
        swap(model, name).pack(weight)
    return model
