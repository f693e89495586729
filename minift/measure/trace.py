"""One training step, explained: each operator and kernel with its place in the code, its time, its bytes, its FLOPs.

    with Trace(model) as trace:
        trace.restart()
        ...a step...
    trace.root                         # the tree (tree.py)

It is a ledger (ledger.py) that looks at its watch. The stack says where in the code an operator is called, and so which
phase and which of minift's operators it belongs to. Modules are those whose forward pass, or another of their methods,
is under way. In backward there are none; but each node of autograd has a number, the next free one when the node is
made, by which what runs in backward is found to be the gradient of something in forward.

Nothing is changed by it but time. What it takes itself is measured and left out, but not what PyTorch takes to call it:
some ten microseconds an operator, which are among Python's.
"""

import itertools
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from ..layers import Again
from ..ops import compile, cuda, sources
from ..ops.rematerialise import Recipe
from .ledger import BATCH, GRADIENTS, PASSING, SAVED, Ledger, is_free, tensors_of, written_arguments
from .tree import Node, leaves

PACKAGE = Path(__file__).parents[1]
HERE = ("minift/measure/", "minift/tracing.py")  # who looks on
OPERATORS = ("minift/ops/", "minift/engine/")  # whose functions are nodes of the tree
PHASES = {"pack": "data", "at_step": "data", "accumulate": "forward", "update": "update"}  # by function of the step
DATA, BACKWARD, UPDATE = "data", "backward", "update"

OVERWRITE = ("aten.copy_", "aten.fill_", "aten.zero_")  # without looking at what was there
SELECT = ("aten.embedding", "aten.index_select", "aten.gather", "aten.index")  # read as much as they write
ADDED_TO = ("z", "dx")  # what kernels write and read too: cross_entropy's and lora_backward's (kernels/README.md)

Scope = tuple[str, str, str, int]  # name, kind, file, line of a node that has others below it


class Trace(Ledger):
    """A ledger that also grows a tree of what is done."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.places = {name: place_of_class(type(module)) for name, module in model.named_modules()}
        self.owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
        self.grows = False  # before the first restart only memory is followed, and nothing is kept of each operator

    def restart(self) -> None:
        """Begins a tree, and to count anew; what is held stays held."""
        self.grows = True
        super().restart()
        self.root = Node("step", "step")
        self.scopes: dict[tuple[Scope, ...], Node] = {(): self.root}
        self.pythons: dict[tuple, Node] = {}
        self.leaves: list[tuple[tuple[Node, ...], Node]] = []  # in time, with the nodes around each
        self.made: dict[int, tuple[str, Node]] = {}  # module and leaf that made a node of autograd, by its number
        self.phase = ""
        self.in_kernel = False
        self.path: tuple[Scope, ...] = ()  # of the leaf at hand, or of the one before
        self.peak_path: tuple[Scope, ...] = ()  # of the leaf at which most was held
        self.cost = 0  # ns that tracing took
        self.begin = time.perf_counter_ns()
        self.until = 0  # ns from the beginning to the end of the last leaf, without that

    # what it sees

    def __torch_dispatch__(self, function: OpOverload, types, args=(), kwargs=None):
        entered = time.perf_counter_ns()
        kwargs = kwargs or {}
        if self.in_kernel:  # a ledger counts FLOPs by means of tensors
            return function(*args, **kwargs)
        if not self.grows:
            return super().__torch_dispatch__(function, types, args, kwargs)
        leaf = self.begin_leaf(str(function.overloadpacket), "torch", entered)
        before = self.flops.total()
        out = super().__torch_dispatch__(function, types, args, kwargs)
        inputs = tensors_of((args, kwargs))
        outputs = tensors_of(out)
        leaf.read, leaf.written = traffic(function, args, kwargs, inputs, outputs)
        self.end_leaf(leaf, entered, before, inputs, outputs)
        return out

    def launch(self, name: str, function: str, library, /, **given) -> None:
        entered = time.perf_counter_ns()
        if not self.grows:
            super().launch(name, function, library, **given)
            return
        file, line, written = declaration(name, function, library.on_cuda)
        leaf = self.begin_leaf(function, "kernel", entered)
        leaf.file, leaf.line = file, line
        before = self.flops.total()
        self.in_kernel = True
        super().launch(name, function, library, **given)
        self.in_kernel = False
        inputs = []
        outputs = []
        for field, value in given.items():
            found = tensors_of({field: value})
            if field in written:
                outputs += found
            if field not in written or field in ADDED_TO:
                inputs += found
        leaf.read = sum(t.nbytes for t in inputs)
        leaf.written = sum(t.nbytes for t in outputs)
        self.end_leaf(leaf, entered, before, inputs, outputs)

    def call(self, function: Callable, args: tuple, kwargs: dict):
        """Runs it, and sets the time of the leaf at hand. On CUDA the device is waited for, before and after."""
        if not self.grows:
            return function(*args, **kwargs)
        synchronise()
        start = time.perf_counter_ns()
        out = function(*args, **kwargs)
        synchronise()
        self.node.ms = (time.perf_counter_ns() - start) / 1e6
        return out

    def begin_leaf(self, name: str, kind: str, entered: int) -> Node:
        """The leaf of a call, in its place in the tree; and the Python that came before it.

        entered: ns, when the trace was called.
        """
        start = entered - self.begin - self.cost
        frames = minift_frames()
        in_backward = torch._C._current_graph_task_id() != -1
        path = self.backward_path(frames) if in_backward else self.forward_path(frames)
        phase = path[0][0] if path else ""
        if phase == UPDATE != self.phase:
            self.own(GRADIENTS, (p.grad for p in self.model.parameters() if p.grad is not None))
        leaf = Node(name, kind, start=start / 1e6)
        if path and path[-1][1] == "operator" and not operators(frames):  # PyTorch's own, in backward
            leaf.file, leaf.line = path[-1][2:]
        elif frames:
            leaf.file, leaf.line = file_of(frames[0].f_code), frames[0].f_lineno
        self.add_python(path, frames, start - self.until)
        self.phase = phase
        self.path = path
        self.node = leaf
        nodes = self.nodes_of(path)
        nodes[-1].children.append(leaf)
        self.leaves.append((nodes, leaf))
        if not in_backward:
            self.made.setdefault(torch._C._autograd._get_sequence_nr() - 1, (self.module, leaf))
        return leaf

    def end_leaf(self, leaf: Node, entered: int, before: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """What is known of a call after it."""
        leaf.flops = self.flops.total() - before
        for t in (*inputs, *outputs):
            leaf.shapes.append(list(t.shape))
            leaf.dtypes.append(str(t.dtype)[6:])
        if self.phase == BACKWARD:
            self.note_users(inputs)
        took = time.perf_counter_ns() - entered
        self.cost += took - round(leaf.ms * 1e6)
        self.until = time.perf_counter_ns() - self.begin - self.cost

    # where it is in the tree

    @property
    def module(self) -> str:
        """The innermost module of which something is under way, or ""."""
        return self.modules[-1] if self.modules else ""

    def forward_path(self, frames: list[FrameType]) -> tuple[Scope, ...]:
        """The scopes around a call outside of backward. frames: the innermost first."""
        top = next((frame.f_code for frame in reversed(frames) if frame.f_code.co_name in PHASES), None)
        if top is None:
            return ()
        phase = PHASES[top.co_name], "phase", *place_of_code(top)
        return (phase, *self.module_scopes(self.module), *operators(frames))

    def backward_path(self, frames: list[FrameType]) -> tuple[Scope, ...]:
        """The same of a call in backward."""
        phase = BACKWARD, "phase", "", 0
        if any(frame.f_code is Again.compute.__code__ for frame in frames):  # a layer once more
            again = "computed again", "again", *place_of_code(Again.compute.__code__)
            return (phase, again, *self.module_scopes(self.module), *operators(frames))
        module, scope = self.at_node(torch._C._current_autograd_node())
        found = operators(frames)
        if not found or found[0][1] == "again":  # one of PyTorch's own
            found.insert(0, scope)
        return (phase, *self.module_scopes(self.module or module), *found)

    def at_node(self, node) -> tuple[str, Scope]:
        """A node of autograd: its module, and its scope, which has the line of what it is the gradient of."""
        if node is None:
            return "", ("autograd", "operator", "", 0)
        name = node.name().rpartition("::")[2]
        if hasattr(node, "variable"):  # it takes the gradient of a parameter
            return self.owners.get(id(node.variable), ""), (name, "operator", "", 0)
        module, leaf = self.made.get(node._sequence_nr(), ("", self.root))  # the root has no line either
        return module, (name, "operator", leaf.file, leaf.line)

    def module_scopes(self, name: str) -> list[Scope]:
        """A scope for each module around and including `name`; the number of a layer goes with its list."""
        found: list[Scope] = []
        whole = ""
        stem = ""
        words = name.split(".") if name else []
        for word, after in itertools.zip_longest(words, words[1:], fillvalue=""):
            whole = f"{whole}.{word}" if whole else word
            stem = f"{stem}.{word}" if stem else word
            if not after.isdigit():
                found.append((stem, "module", *self.places[whole]))
                stem = ""
        return found

    def nodes_of(self, path: tuple[Scope, ...]) -> tuple[Node, ...]:
        """The nodes from the root to the end of a path, made where they are not there."""
        nodes = [self.root]
        for i in range(1, len(path) + 1):
            node = self.scopes.get(path[:i])
            if node is None:
                node = self.scopes[path[:i]] = Node(*path[i - 1])
                nodes[-1].children.append(node)
            nodes.append(node)
        return tuple(nodes)

    def add_python(self, path: tuple[Scope, ...], frames: list[FrameType], ns: int) -> None:
        """Puts what passed since the last leaf into the innermost scope around both."""
        same = 0
        while same < min(len(path), len(self.path)) and path[same] == self.path[same]:
            same += 1
        # the line, in the function that this scope is of, which came to this call
        inner = sum(kind in ("operator", "again") for _, kind, *_ in path[same:])
        outside = [f for f in frames if not file_of(f.f_code).startswith(OPERATORS)] if inner else frames
        file, line = (file_of(outside[0].f_code), outside[0].f_lineno) if outside else ("", 0)
        key = (path[:same], file, line)
        if key not in self.pythons:
            self.pythons[key] = Node("Python", "python", file, line, calls=0)
            self.nodes_of(path[:same])[-1].children.append(self.pythons[key])
        self.pythons[key].ms += ns / 1e6
        self.pythons[key].calls += 1

    # what is held

    def hold(self, tensor: Tensor) -> None:
        before = self.peak
        super().hold(tensor)
        if self.peak > before:
            self.peak_path = self.path

    def turn(self) -> None:
        passing = [held for held in self.held.values() if held.kind == PASSING]
        data = [phase for phase in self.root.children if phase.name == DATA]  # masks are drawn before tokens are packed
        of_the_batch = {leaf for phase in data for leaf in leaves(phase)}
        for held in passing:
            if held.node in of_the_batch:
                held.kind = BATCH
        super().turn()
        for held in passing:
            if held.kind == SAVED and held.node:
                held.node.saved += held.size

    def note_users(self, inputs: list[Tensor]) -> None:
        """Tells the leaves that made what is read in backward, by which operator it is."""
        name = next((scope[0] for scope in self.path if scope[1] == "operator"), "")
        module = ".".join(scope[0] for scope in self.path if scope[1] == "module")
        for t in inputs:
            held = self.held.get(t.untyped_storage()._cdata)
            if held and held.kind == SAVED and held.node:
                held.node.users[f"{name} of {module}" if module else name] = None

    def note_peak(self) -> None:
        """At the end: what each leaf made of what was there when most was held."""
        for held in self.snapshot or self.held.values():
            if held.node:
                held.node.peak += held.size

    # methods of modules beside forward, which has hooks

    def __enter__(self) -> "Trace":
        self.wrapped: list[tuple[nn.Module, str]] = []
        for name, module in self.model.named_modules():
            for method, function in vars(type(module)).items():
                if name and isinstance(function, FunctionType) and not method.startswith("_") and method != "forward":
                    setattr(module, method, self.inside(name, getattr(module, method)))
                    self.wrapped.append((module, method))
        return super().__enter__()

    def inside(self, name: str, method: Callable) -> Callable:
        """The method, during which its module is the innermost."""

        def call(*args, **kwargs):
            self.modules.append(name)
            try:
                return method(*args, **kwargs)
            finally:
                self.modules.pop()

        return call

    def __exit__(self, *reason):
        for module, method in self.wrapped:
            delattr(module, method)
        return super().__exit__(*reason)


def synchronise() -> None:
    """Waits for CUDA, where it is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- places in the code


def minift_frames() -> list[FrameType]:
    """The functions of minift that are under way, the innermost first, up to the step; not those that look on."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        file = file_of(frame.f_code)
        if file and not file.startswith(HERE):
            found.append(frame)
            if frame.f_code.co_name == "train_step":
                break
        frame = frame.f_back
    return found


@cache
def file_of(code: CodeType) -> str:
    """The file of a function of minift, "minift/ops/linear.py"; "" of any other function."""
    path = Path(code.co_filename)
    return path.relative_to(PACKAGE.parent).as_posix() if PACKAGE in path.parents else ""


def place_of_code(code: CodeType) -> tuple[str, int]:
    """File and first line of a function; nothing where it is not minift's."""
    file = file_of(code)
    return file, code.co_firstlineno if file else 0


def place_of_class(cls: type[nn.Module]) -> tuple[str, int]:
    """Those of a module's forward pass."""
    forward = cls.forward
    return place_of_code(forward.__code__) if isinstance(forward, FunctionType) else ("", 0)


def operators(frames: list[FrameType]) -> list[Scope]:
    """The operator of minift that a call is in: the outermost function in its folders that is not outside of a module.

    And below it what makes a tensor again that was not saved, where that is what the call is for.
    """
    run = [frame.f_code for frame in innermost(frames, OPERATORS)]
    found = []
    again = next((i for i, code in enumerate(run) if code is Recipe.__call__.__code__), None)
    if again is not None:
        if again:
            found = [scope_of(run[again - 1], "again")]
        run = [code for code in run[again:] if code.co_name == "backward"]
    if run:
        found.insert(0, scope_of(run[-1], "operator"))
    return found


def innermost(frames: list[FrameType], folders: str | tuple[str, ...]) -> list[FrameType]:
    """The frames, the innermost first, up to one of a function outside these folders."""
    return [*itertools.takewhile(lambda frame: file_of(frame.f_code).startswith(folders), frames)]


def scope_of(code: CodeType, kind: str) -> Scope:
    """A function as a scope."""
    name = code.co_qualname
    return f"{name}, again" if kind == "again" else name, kind, *place_of_code(code)


@cache
def declaration(name: str, function: str, on_cuda: bool) -> tuple[str, int, frozenset[str]]:
    """Of a kernel's function: its file, "kernels/cpu/gelu.cpp", its line, and the fields of its struct that it writes.

    As the source says.
    """
    path = cuda.source(name) if on_cuda else compile.source(name)
    texts = sources.read_sources(path)
    lines = texts[path.name].splitlines()
    found = (i for i, line in enumerate(lines, 1) if line.startswith('extern "C"') and f" {function}(" in line)
    wanted = sources.functions(texts)[function]
    written = wanted.written if wanted else frozenset()
    return f"kernels/{path.relative_to(sources.folder()).as_posix()}", next(found, 0), written


# ---- bytes


def traffic(
    function: OpOverload, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[int, int]:
    """(bytes read, bytes written) by an operator of PyTorch, each tensor once: what it cannot do without.

    A view moves nothing, and memory that is only taken neither.
    """
    if is_free(function):
        return 0, 0
    name = str(function.overloadpacket)
    changed = []
    for i, word in written_arguments(function):
        changed += tensors_of(args[i] if i < len(args) else kwargs.get(word))
    there = {t.untyped_storage()._cdata for t in inputs}
    fresh = [t for t in outputs if t.untyped_storage()._cdata not in there]
    written = sum(size_of(t) for t in (*changed, *fresh))
    if not written:
        return 0, 0
    overwritten = {id(t) for t in changed} if name in OVERWRITE else set()
    read = sum(size_of(t) for t in {id(t): t for t in inputs}.values() if id(t) not in overwritten)
    return (min(read, written) if name in SELECT else read), written


def size_of(t: Tensor) -> int:
    """Bytes of a tensor; of one that repeats its memory, those of the memory."""
    return min(t.nbytes, t.untyped_storage().nbytes())
