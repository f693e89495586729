"""How long the parts of a step take on this machine: each product and each kernel is made, with numbers of no meaning.

    seconds_of(ledger, dtype, device)      of all that a ledger saw

A ledger on the meta device knows the shape of every product and the arguments of every kernel (ledger.py). Layers of a
model are alike, so a step has two dozen different ones, and all of them together take a tenth of it. What else
PyTorch does moves memory: its bytes, at the rate of a copy. To that comes what each call costs in Python.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..layers import LayerNorm, Linear
from ..ops import int8
from ..ops.dropout import Noise
from ..ops.gelu import gelu_tanh
from ..ops.linear import product, weight_gradient
from .ledger import CASTS, OTHERS, SMALL, SMALL_CASTS, UPDATES, Kernel, Ledger, Product, Shape

WORTH = 0.01  # seconds for one part
REPEATS = 4  # at most
ROWS = 128  # products of so many tokens more or less have one rate
LARGEST = 4096  # of a product's sides, and twice its tokens: a larger one has the rate of this
COLD = 1 << 26  # bytes of copies of what a product or a kernel works on
LARGE = 1 << 26  # bytes of a tensor that no cache holds together with its copy
BETWEEN = 1 << 22  # bytes that are written between two calls: more than the cache of a core
SITES = 20  # of three operators each, whose calls are timed
MOST = 1 << 28  # bytes of a kernel's arguments: with more it is not called, and they move at the rate of a copy


def seconds_of(ledger: Ledger, dtype: torch.dtype, device: torch.device) -> float:
    """What all that a ledger saw would take: products, kernels, memory, and calls."""
    total = ledger.moved[OTHERS] / copy_rate(device)
    total += ledger.moved[UPDATES] / update_rate(device)
    total += ledger.moved[CASTS] / cast_rate(device)
    total += ledger.moved[SMALL_CASTS] / small_cast_rate(device)
    total += ledger.calls * call_seconds()
    for what, count in ledger.products.items():
        if not what.flops:
            continue
        total += count * what.flops / product_rate(what, device)
    for key, (kernel, count) in ledger.kernels.items():
        if key not in rates:
            rates[key] = kernel_seconds(kernel, device)
        total += count * rates[key]
    return total


rates: dict[tuple, float] = {}  # what was measured: FLOP/s of a product, seconds of a kernel
kept = 0  # bytes that libraries kept of what was measured, as they do in a run (planning.py)


def product_rate(what: Product, device: torch.device) -> float:
    """FLOP/s of a product of this kind and size."""
    rows = min(LARGEST // 2, -(-what.rows // ROWS) * ROWS)
    inner, outer = min(LARGEST, what.inner), min(LARGEST, what.outer)
    key = what.kind, rows, inner, outer, what.dtype, device.type
    if key not in rates:
        multiply = product_of_codes if what.dtype == torch.int8 else product
        first, second = (rows, inner), (outer, inner)
        if what.kind == "weight gradient":
            multiply = weight_gradient
            first, second = (rows, outer), (rows, inner)
        bytes_of_one = what.dtype.itemsize * (rows * inner + outer * inner + rows * outer)
        copies = copies_of(bytes_of_one)
        pairs = []
        for _ in range(copies):
            x = torch.full(first, 1, dtype=what.dtype, device=device)
            w = torch.full(second, 1, dtype=what.dtype, device=device)
            if what.kind == "input gradient":
                w = w.t().contiguous().t()
            pairs.append((x, w))
        numbers = itertools.cycle(range(copies))
        results = [None] * copies

        def multiply_next() -> None:
            i = next(numbers)
            results[i] = None
            results[i] = multiply(*pairs[i])

        seconds = median_seconds(multiply_next, device)
        rates[key] = 2 * rows * inner * outer / seconds
    return rates[key]


def product_of_codes(x: Tensor, w: Tensor) -> Tensor:
    """x W^T in int32. x (N, in), w (out, in), int8."""
    return int8.multiply(x, w.t())


def kernel_seconds(kernel: Kernel, device: torch.device) -> float:
    """Seconds of a call of one of minift's kernels with arguments like these."""
    if kernel.nbytes > MOST or device.type == "cuda":  # a plan is made with the kernels of the CPU
        return kernel.nbytes / copy_rate(device)
    call = getattr(kernel.library, kernel.function)
    copies = copies_of(kernel.nbytes)
    given = [tree_map(lambda value: stand_in(value, device), kernel.given) for _ in range(copies)]
    turns = itertools.cycle(given)
    return median_seconds(lambda: call(**next(turns)), device)


def copies_of(nbytes: int) -> int:
    """How often there is what a call works on: each has its own, as in a step nothing is left in the cache.

    Once, where it is so much that no cache holds it anyway.
    """
    if nbytes >= COLD:
        return 1
    return max(2, min(REPEATS + 1, COLD // max(1, nbytes)))


def stand_in(value, device: torch.device):
    """For a Shape a tensor of halves, or of zeros where it has whole numbers; anything else as it is."""
    if not isinstance(value, Shape):
        return value
    tensor = torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device=device)
    return tensor.fill_(0.5) if tensor.is_floating_point() else tensor.zero_()


@cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy, those that are read and those that are written."""
    large = torch.zeros(LARGE // 4, device=device)
    other = torch.zeros_like(large)
    return 2 * large.nbytes / median_seconds(lambda: other.copy_(large), device)


@cache
def update_rate(device: torch.device) -> float:
    """Bytes/s of a sum in place, as of an optimizer's update, read and written: it writes what it has just read."""
    large = torch.zeros(LARGE // 4, device=device)
    other = torch.zeros_like(large)
    return 3 * large.nbytes / median_seconds(lambda: large.add_(other), device)


@cache
def cast_rate(device: torch.device) -> float:
    """Bytes/s of a cast of a layer's weights between float32 and bfloat16, read and written."""
    # many, for in a step neither the weights nor where they go are in the cache
    weights = [torch.zeros(1 << 21, device=device) for _ in range(16)]
    casts = [x.bfloat16() for x in weights]

    def cast_all() -> None:
        for i, x in enumerate(weights):
            casts[i] = None
            casts[i] = x.to(torch.bfloat16)

    return 1.5 * sum(x.nbytes for x in weights) / median_seconds(cast_all, device)


@cache
def small_cast_rate(device: torch.device) -> float:
    """The same of parts of weights in bfloat16, each of which is gone before the next is made float32."""
    parts = [torch.zeros(SMALL // 4, dtype=torch.bfloat16, device=device) for _ in range(LARGE // SMALL)]

    def cast_all() -> None:
        for x in parts:
            x.float()

    return 3 * sum(x.nbytes for x in parts) / median_seconds(cast_all, device)


def best_product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The highest FLOP/s of all products that were measured, a large one among them."""
    product_rate(Product("layer", 1024, 1024, 4096, dtype), device)
    return max(rate for key, rate in rates.items() if key[-2:] == (dtype, device.type))


@cache
def call_seconds() -> float:
    """Seconds of a call of an operator that has hardly anything to compute, with the Python around it.

    In a step what an operator computes drives Python out of the core's cache: here something else does.
    """
    cpu = torch.device("cpu")
    between = torch.zeros(BETWEEN // 4)
    layers = nn.ModuleList([Linear(8, 8), LayerNorm(8, 1e-5)])
    linear, norm = layers
    for p in layers.parameters():
        p.data.fill_(0.5)
    noise = Noise(keys=torch.zeros(1, dtype=torch.int32))

    def few_calls() -> None:
        h = x = torch.ones(1, 8)
        for site in range(SITES):
            x = linear(x)
            between.zero_()
            x = gelu_tanh(x)
            between.zero_()
            h, x = norm.add(x, h, 0.1, noise, site)
            between.zero_()
        x.sum().backward()

    def what_is_between() -> None:
        for _ in range(3 * SITES):
            between.zero_()

    with Ledger(layers) as ledger:
        few_calls()
    seconds = median_seconds(few_calls, cpu) - median_seconds(what_is_between, cpu)
    return max(seconds, 0) / (ledger.calls - 3 * SITES)


def median_seconds(function: Callable, device: torch.device) -> float:
    """Seconds of a call, the median of as many as are worth it, after a first that does not count."""
    found: list[float] = []
    total = 0.0
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
        total += found[-1]
        if total > WORTH and len(found) > 3:
            break
    return statistics.median(found[1:])
