"""One step of a run, taken and explained: `minift trace`.

The step is the run's first, on its model and its data, in the loop's own code (training.train_step). It is taken
several times: to warm up, to be timed, to be looked at by a trace (measure/trace.py), and with --verify to have its
kernels compared with their references (measure/verify.py). Nothing of the run is written.
"""

import json
import math
import statistics
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import TraceConfig
from .data.batch import Sequence, order
from .data.tokenizer import require_tokenizer
from .engine import memory
from .engine.distributed import ALONE
from .errors import InputError, printable, table_lines
from .files import check_output_file, write_text
from .measure.ledger import MOMENTS
from .measure.rates import best_product_rate, copy_rate
from .measure.trace import DATA, Trace
from .measure.track import peak_memory, resident
from .measure.tree import Node, add_up, as_chrome, as_json, costliest_lines, folded, leaves, tree_lines
from .measure.verify import Check, Verifier
from .models import check_length
from .runs import read_labelled, tokenise_texts
from .setup import Job, choose_engine, load_model, make_job
from .tasks import task_named
from .training import train_step

SCREEN = 40  # lines
TIMED = 3  # steps without a trace
TRIES = 3  # steps with one, at most, until one takes as long as those without
NEAR = 0.1  # by how much of that it may differ
NAMED = 3  # lines of data that are named


@dataclass
class Traced:
    """A step that was looked at; bytes, milliseconds."""

    root: Node
    trace: Trace
    job: Job
    sequences: list[Sequence]  # that it trained on
    where: list[str]  # the line of each in its file
    micro_batches: int
    traced: float  # ms of the step that was traced
    untraced: float  # ms of one that was not
    kinds: dict[str, int]  # bytes by kind, when most was held
    heap: int  # what the heap grew to for them
    growth: int  # what the process had for the step at most, on a GPU what was allocated there; 0: not known
    product_rate: float  # FLOP/s
    copy_rate: float  # bytes/s
    checks: list[Check]  # with --verify

    @property
    def busy(self) -> float:
        """ms of operators and kernels."""
        return sum(leaf.ms for leaf in leaves(self.root) if leaf.kind != "python")

    @property
    def explained_time(self) -> float:
        """The share of a step's time that is some operator's or kernel's. What is left is Python's."""
        return min(1.0, self.busy / self.untraced)

    @property
    def explained_memory(self) -> float:
        """The share of the peak that is known to the byte, holes of the heap included."""
        return self.heap / self.growth if self.growth else math.nan


def trace_run(config: TraceConfig) -> Traced:
    """The first step of a run. Raises InputError."""
    check_trace(config)
    job, sequences, where = begin(config)
    traced = trace_step(job, sequences)
    traced.where = where
    add_lines(traced)
    if config.verify:
        verify_step(traced)
    return traced


def check_trace(config: TraceConfig) -> None:
    """Raises InputError for what cannot be traced, or files that cannot be written."""
    if config.graph:
        raise InputError("--graph is True: a step that is replayed has no operators to look at; expected one without")
    for option, path in (("--out", config.out), ("--chrome", config.chrome)):
        if path:
            check_output_file(option, Path(path), [config.data, config.valid], config.overwrite)


def begin(config: TraceConfig) -> tuple[Job, list[Sequence], list[str]]:
    """(the job, the sequences of its first step, the line of each)."""
    task = task_named(config.task)
    labels, examples, _ = read_labelled(config)
    engine = choose_engine(config)
    if engine.world.size > 1:
        raise InputError(f"there are {engine.world.size} processes; expected a trace of one, without torchrun")
    model, tokenizer = load_model(config, labels)
    require_tokenizer(tokenizer, config.model)
    tokenise_texts(tokenizer, ALONE, examples)
    sequences = task.encode(examples, model, tokenizer, check_length(model, config.max_length))
    job = make_job(model, config, engine)
    numbers = order(len(sequences), config.seed, 0)[: config.batch].tolist()
    chosen = [sequences[i] for i in numbers]
    where = [getattr(examples[s.number], "where", "") if s.number < len(examples) else "" for s in chosen]
    return job, chosen, where


def trace_step(job: Job, sequences: list[Sequence]) -> Traced:
    """One step, traced, after others that were not."""
    step = 0

    def take() -> float:
        """Milliseconds of a step."""
        nonlocal step
        start = time.perf_counter()
        train_step(job, sequences, step, job.config.lr)  # which ends by reading the loss: all is done then
        step += 1
        return 1000 * (time.perf_counter() - start)

    # the first step makes the optimizer's state and the caches: of it only the memory is followed
    trace = Trace(job.model)
    base = own_without(trace)
    with trace:
        take()
    for state in job.optimizer.state.values():
        trace.own(MOMENTS, state.values())

    # the peak of steps that nobody looks at, for a tree takes memory too
    restart_peak()
    untraced = [take() for _ in range(TIMED)]
    growth = peak_since(base)

    # others may use the machine: a step that they held up is no example of one
    for _ in range(TRIES):
        with trace:
            trace.restart()
            traced = take()
        untraced.append(take())
        without_tracing = traced - trace.cost / 1e6
        if abs(without_tracing / statistics.median(untraced) - 1) < NEAR:
            break

    # the rates come last: the memory of what they multiply and copy would be kept for the step
    device = job.model.device
    product_rate = best_product_rate(job.model.body.dtype, device)
    copies = copy_rate(device)
    trace.note_peak()
    add_up(trace.root, product_rate, copies)
    micros = job.micro_batches(sequences)
    return Traced(
        root=trace.root,
        trace=trace,
        job=job,
        sequences=sequences,
        where=[""] * len(sequences),
        micro_batches=len(micros),
        traced=traced,
        untraced=statistics.median(untraced),
        kinds=trace.at_peak(),
        heap=trace.heap.most if job.model.device.type == "cpu" else trace.peak,
        growth=growth,
        product_rate=product_rate,
        copy_rate=copies,
        checks=[],
    )


def add_lines(traced: Traced) -> None:
    """Puts the lines of data that the step is from into the tree, with their tokens; they were encoded before it."""
    data = next(node for node in traced.root.children if node.name == DATA)
    lines = []
    for where, sequence in zip(traced.where, traced.sequences, strict=True):
        name = printable(where) or f"example {sequence.number}"
        lines.append(Node(name, "line", shapes=[[len(sequence)]], dtypes=["tokens, cut" if sequence.cut else "tokens"]))
    data.children[:0] = lines


def own_without(trace: Trace) -> int:
    """Bytes of this process's own without what the trace knows of, the weights; 0 where the system does not say."""
    memory.trim()  # of what loading left
    own, _ = resident()
    return max(0, own - trace.now)


def restart_peak() -> None:
    """Lets the peak of memory begin at what is there now."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux; where it may not be written, the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_since(base: int) -> int:
    """What was held since then at most, by the allocator on CUDA, else by the process's own beyond `base` bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    _, libraries = resident()
    return peak_memory() - libraries - base if base else 0


def verify_step(traced: Traced) -> None:
    """Takes the same step again, and compares its kernels with their references. Their nodes get errors, too."""
    verifier = Verifier()
    with verifier:
        train_step(traced.job, traced.sequences, TIMED + 2, traced.job.config.lr)
    worst = {check.name: check.error for check in verifier.checks}
    for leaf in leaves(traced.root):
        if leaf.kind == "kernel":
            leaf.error = max((worst[name] for name in verifier.by_kernel.get(leaf.name, ())), default=None)
    add_up(traced.root, traced.product_rate, traced.copy_rate)
    traced.checks = verifier.checks


# ---- what is told of it


def describe(traced: Traced, width: int, unfold: str) -> list[str]:
    """The lines of `minift trace`. unfold: levels of the tree, or "all"; "": what costs most, on one screen."""
    lines = []
    for line in summary(traced):  # with a name of eight columns in front
        lines += textwrap.wrap(line, width, subsequent_indent=" " * 8, break_on_hyphens=False)
    rest = costliest_lines(traced.root, width)
    if unfold == "all":
        tree = tree_lines(traced.root, width, 0, depth=100)
    elif unfold:
        tree = tree_lines(folded(traced.root), width, 0, depth=int(unfold))
    else:
        tree = tree_lines(folded(traced.root), width, SCREEN - len(lines) - len(rest) - 4)
    lines += ["", *tree, "", *rest]
    if traced.checks:
        lines += ["", *check_lines(traced.checks)]
    return lines


def summary(traced: Traced) -> list[str]:
    """What was traced, what tracing cost, and how much of time and memory is explained."""
    config, model = traced.job.config, traced.job.model
    tokens = sum(map(len, traced.sequences))
    micros = f"{traced.micro_batches} micro-batch{'es' if traced.micro_batches > 1 else ''}"
    named = ", ".join(filter(None, traced.where[:NAMED]))
    if named and len(traced.where) > NAMED:
        named += f" and {len(traced.where) - NAMED} more"
    when = " ".join(name for name, kind, *_ in traced.trace.peak_path if kind in ("phase", "module", "operator"))
    kinds = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in traced.kinds.items() if size > 5e4)
    held = f"{sum(traced.kinds.values()) / 1e6:,.1f} MB at the peak, in {when or 'the step'}: {kinds}"
    if traced.growth:
        held += f"; with holes {100 * traced.explained_memory:.0f} % of what was taken, {traced.growth / 1e6:,.1f}"
    return [
        f"step    {len(traced.sequences)} examples, {tokens:,} tokens, {micros}; {config.method}, "
        f"{str(model.body.dtype)[6:]} on {model.device.type}{f'; {printable(named)}' if named else ''}",
        f"time    {traced.untraced:,.1f} ms without a trace, of which operators and kernels take {traced.busy:,.1f} "
        f"({100 * traced.explained_time:.0f} %) and Python the rest; with the trace {traced.traced:,.1f}, "
        f"of which {traced.trace.cost / 1e6:,.1f} are its own and not shown",
        f"memory  {held}",
        f"roof    the share of the time that {traced.product_rate / 1e9:,.0f} GFLOP/s of products or "
        f"{traced.copy_rate / 1e9:,.1f} GB/s of copies would need; moved, saved for backward: MB",
    ]


def check_lines(checks: list[Check]) -> list[str]:
    """The table of --verify."""
    rows = [(c.name, f"{c.calls}", f"{c.error:.1e}", f"{c.plain:.1e}", c.where) for c in checks]
    return table_lines(("kernel against reference", "calls", "largest error", "PyTorch's", "where"), rows, "<>>><")


def write_files(traced: Traced, config: TraceConfig) -> None:
    """--out and --chrome. Raises OSError."""
    if config.out:
        write_text(Path(config.out), json.dumps(whole_tree(traced)) + "\n")
    if config.chrome:
        write_text(Path(config.chrome), json.dumps(as_chrome(traced.trace.leaves)) + "\n")


def whole_tree(traced: Traced) -> dict:
    """The tree as JSON, and in its root what is known of the step as a whole."""
    tree = as_json(traced.root)
    return tree | {
        "traced_ms": traced.traced,
        "untraced_ms": traced.untraced,
        "kinds": traced.kinds,
        "growth": traced.growth,
        "product_rate": traced.product_rate,
        "copy_rate": traced.copy_rate,
    }
