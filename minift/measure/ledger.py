"""Where the bytes and the FLOPs of a step go: every tensor from its making to its end, every product.

    with Ledger(model) as ledger:      # sees each operator of PyTorch and each kernel of minift
        ...a step...
    ledger.peak                        # bytes, when most are held
    ledger.at_peak()                   # the same by kind
    ledger.flops                       # of products, by the operator that makes them

On the meta device a tensor has a shape and no memory, and nothing is computed. The same step run there is a forecast
(planning.py), and takes a second whatever the model's size. It counts what PyTorch and the operators of ops/ hold,
since it is they who hold it. On another device the same numbers are a measurement.
"""

import bisect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from ..ops import native
from ..ops.linear import cpu_bfloat16

aten = torch.ops.aten

FROZEN = "frozen weights"
TRAINED = "trained weights"
GRADIENTS = "gradients"
MOMENTS = "optimizer state"
BATCH = "batch"
SAVED = "saved for backward"
PASSING = "in passing"
CASTS = "casts"
SMALL_CASTS = "casts of a few MB"
UPDATES = "operators in place"
OTHERS = "other operators"
SMALL = 1 << 22  # bytes of a tensor that is used while a cache still has it
KINDS = (FROZEN, TRAINED, GRADIENTS, MOMENTS, BATCH, SAVED, PASSING)


@dataclass
class Held:
    """The memory of a tensor, and of all views of it."""

    size: int  # bytes
    kind: str
    maker: str  # the module in whose forward pass it was made, or ""
    place: int  # in the heap
    node: Any  # of a trace, that made it (trace.py)


@dataclass(frozen=True)
class Product:
    """A product of a linear layer: y = x W^T ("layer"), dx = dy W ("input gradient"), dW = dy^T x ("weight gradient").

    rows: tokens; inner and outer: the other two sides, of which W in "layer" is (outer, inner).
    """

    kind: str
    rows: int
    inner: int
    outer: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class Shape:
    """All of a tensor but its numbers."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.dtype.itemsize * math.prod(self.sizes)


@dataclass(frozen=True)
class Kernel:
    """A call of one of minift's kernels on tensors without memory."""

    library: object
    function: str
    given: dict  # its arguments, with a Shape for each of these tensors

    @property
    def nbytes(self) -> int:
        """Bytes that it reads and writes."""
        return sum(value.nbytes for value in tree_leaves(self.given) if isinstance(value, Shape))


class Ledger(TorchDispatchMode):
    """What is held from moment to moment while it is active, and how much is multiplied."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.held: dict[int, Held] = {}  # by the storage, while it lives
        self.heap = Heap()
        self.now = 0  # bytes
        self.modules: list[str] = []  # in whose forward pass we are, the innermost last
        self.hooks: list = []
        self.in_backward = False
        self.node: Any = None  # what a trace says of the operator at hand
        self.restart()
        for p in model.parameters():
            self.own(TRAINED if p.requires_grad else FROZEN, [p])
        self.own(FROZEN, model.buffers())

    def restart(self) -> None:
        """Begins to count anew; what is held stays held."""
        self.peak = self.now
        self.snapshot: list[Held] = []  # what was held at the peak, as soon as it is over
        self.saved: Counter[str] = Counter()  # bytes that the last forward pass left for backward, by module
        self.flops: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()  # bytes read and written by kernels, casts, UPDATES and OTHERS
        self.products: Counter[Product] = Counter()
        self.kernels: dict[tuple, tuple[Kernel, int]] = {}  # of a forecast: different calls, and how many there are
        self.calls = 0  # of operators and kernels

    def own(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says of what kind tensors are, which were there before or were made meanwhile."""
        for tensor in tensors_of([*tensors]):
            self.hold(tensor)
            self.held[tensor.untyped_storage()._cdata].kind = kind

    def hold(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor until it is given back; of a view, nothing."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        if number in self.held:
            return
        size = storage.nbytes()
        maker = self.modules[-1] if self.modules else ""
        self.held[number] = Held(size, PASSING, maker, self.heap.take(size), self.node)
        self.now += size
        weakref.finalize(storage, self.release, number).atexit = False
        if self.now > self.peak:
            self.peak = self.now
            self.snapshot = []

    def release(self, number: int) -> None:
        """A storage was given back."""
        if not self.snapshot and self.now == self.peak:
            self.snapshot = list(self.held.values())
        held = self.held.pop(number)
        self.now -= held.size
        self.heap.give_back(held.place, held.size)

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind when most were held."""
        found = dict.fromkeys(KINDS, 0)
        for held in self.snapshot or self.held.values():
            found[held.kind] += held.size
        return found

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks. To skip its compiler, which is not in use here, would import it: 75 MB and a second."""
        return False

    # what it sees

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self.in_backward:
            self.turn()
        self.in_backward = in_backward
        out = self.call(function, args, kwargs)
        for tensor in tensors_of(out):
            self.hold(tensor)
        self.calls += 1
        packet = IN_PLACE.get(function.overloadpacket, function.overloadpacket)
        if packet in COUNTED:
            self.flops[str(packet)] += COUNTED[packet](*args, **kwargs, out_val=out)
        if packet in PRODUCTS:
            self.products[product_of(packet, args)] += 1
        elif packet not in COUNTED and not is_free(function):
            what = OTHERS
            if packet is aten._to_copy:
                what = SMALL_CASTS if is_gone_at_once(out) else CASTS
            elif function._schema.is_mutable:
                what = UPDATES
            self.moved[what] += bytes_moved(function, args, kwargs, out)
        return out

    def call(self, function: Callable, args: tuple, kwargs: dict):
        """Runs an operator or a kernel."""
        if function in ON_META and args[1].is_meta:
            return ON_META[function](*args)
        return function(*args, **kwargs)

    def launch(self, name: str, function: str, library, /, **given) -> None:
        """A call of a kernel, which is counted, and made where there is memory."""
        self.calls += 1
        self.moved[name] += nbytes(given)
        if function in FLOPS:
            self.flops[name] += FLOPS[function](given)
        shapes = tree_map(shape_of, given)
        described = [value for value in tree_leaves(shapes) if isinstance(value, Shape | bool)]
        if not any(isinstance(value, Shape) for value in described):
            self.call(getattr(library, function), (), given)
            return
        key = name, function, *described
        _, count = self.kernels.get(key, (None, 0))
        self.kernels[key] = Kernel(library, function, shapes), count + 1

    def turn(self) -> None:
        """Where a backward pass begins: what is passing is what was saved for it."""
        self.saved = Counter()
        for held in self.held.values():
            if held.kind == PASSING:
                held.kind = SAVED
                self.saved[held.maker] += held.size

    def kernel(self, name: str, library) -> "Seen":
        """What stands before a kernel of minift's meanwhile."""
        return Seen(self, name, library)

    def __enter__(self):
        self.before = native.watch
        native.watch = self.kernel
        for name, module in self.model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.modules.append(name)))
            # also where a layer that is computed again has all that it was computed for, and breaks off
            self.hooks.append(module.register_forward_hook(self.leave, always_call=True))
        return super().__enter__()

    def leave(self, *_) -> None:
        """The end of a module's forward pass."""
        self.modules.pop()

    def __exit__(self, *reason):
        native.watch = self.before
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        return super().__exit__(*reason)


class Seen:
    """A library of kernels that somebody looks at."""

    def __init__(self, ledger, name: str, library):
        """ledger: has a method `launch`, as Ledger's."""
        self.ledger = ledger
        self.name = name
        self.library = library
        self.on_cuda = library.on_cuda

    def __getattr__(self, function: str) -> Callable:
        return partial(self.ledger.launch, self.name, function, self.library)


def tensors_of(tree) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries; of a sparse one, as of an embedding's gradient, its parts."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            found.append(leaf)
        elif isinstance(leaf, Tensor):
            found += [leaf._indices(), leaf._values()]
    return found


def shape_of(value) -> object:
    """The shape of a tensor without memory; anything else as it is, such as where sequences begin."""
    if isinstance(value, Tensor) and value.is_meta:
        return Shape(value.dtype, tuple(value.shape), value.stride())
    return value


def product_of(packet, args: tuple) -> Product:
    """The product of an operator of PyTorch, the several of `bmm` as one; of `addmm` without the first argument."""
    a, b = args[:2] if packet in (aten.mm, aten.bmm, aten._int_mm) else args[1:3]
    rows, inner = math.prod(a.shape[:-1]), a.shape[-1]
    outer = b.shape[-1]
    if a.dim() == 2 and a.stride(0) == 1 and a.stride(1) > 1:
        return Product("weight gradient", inner, outer, rows, a.dtype)
    if b.dim() == 2 and b.stride(1) == 1 and b.stride(0) > 1:
        return Product("input gradient", rows, inner, outer, a.dtype)
    return Product("layer", rows, inner, outer, a.dtype)


# what torch's own count does not see: products in place, of int8, and oneDNN's
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
COUNTED = dict(flop_registry)
COUNTED[aten._int_mm] = flop_registry[aten.mm]
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    COUNTED[torch.ops.mkldnn._linear_pointwise] = lambda x, *_, out_val: 2 * x.numel() * out_val.shape[-1]
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._int_mm}

# Without memory PyTorch finds the shape of these in Python, which would be a quarter of a plan's time.
ON_META = {
    aten.addmm.default: lambda onto, a, b: a.new_empty(len(a), b.shape[1]),
    aten.addmm_.default: lambda onto, a, b: onto,
}

# operators that touch some rows of their first argument, as many as they give or take
SOME_ROWS = {"embedding", "index_select", "index", "gather", "index_add_", "index_put_"}


def is_gone_at_once(cast: Tensor) -> bool:
    """Whether a cast is a part of a matrix that is multiplied in float32 (ops/linear.py), while the cache has it."""
    return cast.dtype == torch.float32 and cast.nbytes <= SMALL and not cpu_bfloat16()


def is_free(function) -> bool:
    """Whether an operator touches no memory: it gives another view of what is there, or memory as it is."""
    name = function._schema.name.partition("::")[2]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    return is_view or name.startswith(("empty", "new_empty"))


def bytes_moved(function, args: tuple, kwargs: dict, out) -> int:
    """Bytes that an operator of PyTorch reads and writes."""
    schema = function._schema
    touched = args
    if schema.name.partition("::")[2] in SOME_ROWS:
        touched = args[1:]
    read = nbytes(touched)
    if not schema.is_mutable:
        return read + nbytes(out)
    if len(touched) < len(args):
        return 2 * read
    return read + nbytes([args[i] for i, _ in written_arguments(function) if i < len(args)])


@cache
def written_arguments(function: OpOverload) -> list[tuple[int, str]]:
    """(number, name) of the arguments that an operator changes in place."""
    arguments = function._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def nbytes(tree) -> int:
    """Bytes of all tensors in lists, tuples and dictionaries."""
    return sum(t.nbytes for t in tensors_of(tree))


def attention_flops(given: dict) -> int:
    """Of the kernel's products, from its arguments: two forward, five backward, for each query and key that meet.

    Where only some tokens ask, they are taken to be spread over the sequences evenly.
    """
    lengths = given["offsets"].diff()
    pairs = int((lengths * lengths).sum())
    if given["causal"]:
        pairs = (pairs + int(lengths.sum())) // 2
    pairs = pairs * given["M"] // max(1, int(lengths.sum()))
    products = 5 if given["backward"] else 2
    return 2 * products * pairs * given["H"] * given["D"]


def lora_flops(given: dict) -> int:
    """Of the kernels' products of (N, C) and (C, R), each for one thing that is asked for."""
    products = sum(given.get(name) is not None for name in ("h", "sums", "dx"))
    return 2 * products * given["N"] * given["C"] * given["R"]


def int8_flops(given: dict) -> int:
    """Of the product (N, C) (C, O)."""
    return 2 * given["N"] * given["C"] * given["O"]


FLOPS = {
    "attention": attention_flops,
    "lora_forward": lora_flops,
    "lora_backward": lora_flops,
    "multiply": int8_flops,
}


class Heap:
    """What glibc's heap grows to: the best fit among free blocks, neighbours joined, large blocks mapped by themselves.

    A block that is free between two that are not is held all the same. engine/memory.py sets glibc so that it gives
    nothing back in between, which is what is followed here; addresses are counted from 0.
    """

    LARGE = 1 << 25  # bytes, from which a block is mapped by itself (M_MMAP_THRESHOLD)
    PAGE = 4096

    def __init__(self) -> None:
        self.top = 0  # where the heap ends
        self.mapped = 0  # bytes of large blocks
        self.most = 0  # bytes of heap and large blocks together
        self.reached = 0  # how far the top ever was
        self.sizes: list[tuple[int, int]] = []  # (size, begin) of free blocks, ascending
        self.begins: dict[int, int] = {}  # free blocks: begin -> size
        self.ends: dict[int, int] = {}  # the same: end -> begin

    def take(self, size: int) -> int:
        """The beginning of a block; -1 of a large one."""
        if size >= self.LARGE:
            self.mapped += self.in_pages(size)
            self.grown()
            return -1
        size = self.rounded(size)
        i = bisect.bisect_left(self.sizes, (size, -1))
        if i < len(self.sizes):
            found, begin = self.sizes[i]
            self.remove(begin)
            if found > size:
                self.insert(begin + size, found - size)
            return begin
        begin = self.top
        self.top += size
        self.grown()
        return begin

    def give_back(self, begin: int, size: int) -> None:
        """A block is free."""
        if size >= self.LARGE:
            self.mapped -= self.in_pages(size)
            return
        size = self.rounded(size)
        if begin + size in self.begins:
            size += self.remove(begin + size)
        if begin in self.ends:
            before = self.ends[begin]
            size += self.remove(before)
            begin = before
        if begin + size == self.top:
            self.top = begin
        else:
            self.insert(begin, size)

    def rounded(self, size: int) -> int:
        """What a block takes: torch's alignment to 64 bytes and glibc's own 16."""
        return -(-(size + 80) // 16) * 16

    def in_pages(self, size: int) -> int:
        return -(-size // self.PAGE) * self.PAGE

    def grown(self) -> None:
        """After something was taken beyond what there was."""
        self.reached = max(self.reached, self.top)
        self.most = max(self.most, self.reached + self.mapped)

    def insert(self, begin: int, size: int) -> None:
        self.begins[begin] = size
        self.ends[begin + size] = begin
        bisect.insort(self.sizes, (size, begin))

    def remove(self, begin: int) -> int:
        size = self.begins.pop(begin)
        del self.ends[begin + size]
        self.sizes.pop(bisect.bisect_left(self.sizes, (size, begin)))
        return size
