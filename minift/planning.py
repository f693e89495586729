"""What a run will take, before anything is allocated: `minift plan`, and `--fit`, which makes it take less.

The model is made without weights, on the meta device, where a tensor has a shape and no memory. Two steps of training
run there and a ledger (measure/ledger.py) sees what they hold and multiply. So nothing is computed by formulas that
could be out of date: what the code does is what is counted.

Memory is that of the process, at the largest micro-batch: Python, torch and the data as they are here, and the heap
with its holes. Seconds are those of a step of the median size, whose parts are timed here (measure/rates.py).
"""

import copy
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from . import files
from .adapters import changes_base, saved_as
from .config import TrainConfig, size_of
from .data.batch import Sequence, order, pack
from .data.tokenizer import Tokenizer
from .engine import memory
from .engine.distributed import ALONE
from .engine.precision import choose_device, choose_dtype
from .errors import InputError, table_lines
from .measure import rates
from .measure.ledger import BATCH, FROZEN, GRADIENTS, MOMENTS, TRAINED, Ledger
from .measure.rates import best_product_rate, seconds_of
from .measure.summary import measured
from .measure.track import peak_memory, resident, say
from .models import Model, check_length
from .ops import native
from .ops.dropout import Noise
from .runs import read_labelled, tokenise_texts
from .setup import Engine, Job, default_tokens, load_model, make_job, use_kernels
from .tables import BASES, method_named
from .tasks import task_named
from .training import accumulate, update

LOOK = 1000  # steps whose micro-batches are looked at
SOME = 4  # micro-batches of a step that are run: others are taken to be like them, by their tokens
META = torch.device("meta")
STEP = 1.25  # between two numbers of tokens that --fit tries
TIMING = 1 << 28  # bytes at most that a forecast takes to be made
FITTED = ("tokens", "recompute", "base")  # the options that --fit chooses
OFF, ALWAYS = 1.05, 16e6  # a forecast of memory may be off by a twentieth and so many bytes: --fit leaves that room


@dataclass
class Plan:
    """What a run takes; bytes, FLOPs, seconds."""

    config: TrainConfig
    kinds: dict[str, int]  # bytes by kind, when most are held
    held: int  # their sum
    heap: int  # what the heap grows to for them
    workspace: int  # bytes that the libraries of products keep: their code for each shape, and working memory
    loading: int  # bytes that the model takes until it is ready for the first step
    process: int  # bytes of this process, without a model
    by_module: dict[str, int]  # of what is saved for backward, which module left how much
    largest: int  # tokens of the largest micro-batch
    tokens: int  # of a step of the median size
    micro_batches: int  # of that step
    flops: int  # of its products
    seconds: float  # of that step
    trained: int  # weights that learn
    weights: int
    device: torch.device
    dtype: torch.dtype
    free: int = 0  # bytes that this machine has for it
    most: int = 0  # tokens at once that fit into them, at most; 0: none do

    @property
    def memory(self) -> int:
        """Bytes of the process at its peak; on a GPU those of the GPU."""
        if self.device.type == "cuda":
            return self.held
        return self.process + max(self.heap + self.workspace, self.loading)

    @property
    def bound(self) -> tuple[int, float]:
        """(bytes, seconds) that no implementation could do with less of here: weights with the optimizer's state, and
        the products alone at the highest rate that was measured.
        """
        kept = sum(self.kinds[kind] for kind in (FROZEN, TRAINED, MOMENTS))
        return kept, self.flops / best_product_rate(self.dtype, self.device)


@dataclass
class Subject:
    """What a plan is made of: examples, and a model without weights, which a plan prepares for training."""

    model: Model
    labels: list[str] | None
    sequences: list[Sequence]
    device: torch.device  # where the run is to be
    dtype: torch.dtype
    own: int  # bytes of this process that are not of files
    loading: int  # bytes that the model takes until it is ready: all weights as they are read, and a copy of one


def forecast(config: TrainConfig) -> Plan:
    """The plan of a checked configuration. Raises InputError."""
    subject = read_subject(config)
    plan = plan_for(subject, config)
    plan.free = memory.available(subject.device)
    options, size = most_tokens(subject, replace(config, tokens=0), plan.free, plan.process)
    if with_room(plan.process + size) <= plan.free:
        plan.most = options.tokens
    return plan


def read_subject(config: TrainConfig) -> Subject:
    """Reads and encodes the examples. Raises InputError."""
    task = task_named(config.task)
    labels, examples, _ = read_labelled(config)
    model, tokenizer = load_shapes(config, labels)
    tokenise_texts(tokenizer, ALONE, examples)
    sequences = task.encode(examples, model, tokenizer, check_length(model, config.max_length))
    device, _ = choose_device(config.device)
    dtype, _ = choose_dtype(config.precision, device)
    use_kernels(config, device)
    if device.type == "cpu":
        memory.keep_memory()
    own, _ = resident()
    return Subject(model, labels, sequences, device, dtype, own, sum(sizes(model)))


def load_shapes(config: TrainConfig, labels: list[str] | None) -> tuple[Model, Tokenizer | None]:
    """The model of a configuration without its weights, and the tokenizer."""
    method = saved_as(config.method) if changes_base(config.method) else config.method  # the shapes are the same
    return load_model(replace(config, init="shapes", method=method), labels)


def plan_for(subject: Subject, config: TrainConfig) -> Plan:
    """The plan of the subject with the options of `config`."""
    job, steps = job_for(subject, config)
    return plan_of(job, steps, subject.device, subject.dtype, subject.own, subject.loading)


def job_for(subject: Subject, config: TrainConfig) -> tuple[Job, list]:
    """(the job of a subject on the meta device, the micro-batches of each of its steps)."""
    tokens = config.tokens or default_tokens(subject.model, subject.device, subject.dtype)
    config = replace(config, tokens=tokens)
    before = sum(sizes(subject.model))
    job = make_job(subject.model, config, Engine(META, subject.dtype))
    if sum(sizes(job.model)) < before:  # frozen weights are cast when all have been read
        subject.loading = before + max(sizes(job.model))
    return job, list(steps_of(job, subject.sequences))


def footprint(model: Model) -> tuple[int, int]:
    """(bytes of this process that are neither a file's nor the model's, bytes that loading has taken), before a run."""
    own, libraries = resident()
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.is_cpu)
    own = max(0, own - weights)
    return own, peak_memory() - own - libraries


def forecast_run(job: Job, sequences: list[Sequence], before: tuple[int, int]) -> Plan | None:
    """The plan of a run that has ended, from its configuration alone; None where processes share its weights.

    Made afterwards, so that it takes none of the run's memory and time. before: its `footprint`.
    """
    if job.world.sharded:
        return None
    if memory.available(torch.device("cpu")) < TIMING:
        say(f"no forecast: it would take {TIMING / 1e6:,.0f} MB, which are not free here")
        return None
    dtype = job.model.body.dtype
    own, loading = before
    steps = list(steps_of(job, sequences))
    planned = make_job(without_memory(job.model), job.config, Engine(META, dtype))
    try:
        return plan_of(planned, steps, job.model.device, dtype, own, loading)
    except InputError as e:
        say(f"no forecast: {e}")
        return None


def without_memory(model: Model) -> Model:
    """A copy on the meta device."""
    memo: dict[int, object] = {id(model.family): model.family}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device=META), p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=META)
    return copy.deepcopy(model, memo)


def plan_of(job: Job, steps: list, device: torch.device, dtype: torch.dtype, own: int, loading: int) -> Plan:
    """The plan of a job on the meta device. steps: the micro-batches of each; device: where it is to run; own, loading:
    as in Subject.
    """
    largest = max(steps, key=lambda micros: max(map(count_tokens, micros)))
    by_size = sorted(steps, key=lambda micros: sum(map(count_tokens, micros)))
    median = by_size[len(by_size) // 2]
    if native.mode != "reference" and device.type == "cpu":
        native.make_all(device)  # every kernel that a run loads
    some = median[:SOME]
    times = sum(map(count_tokens, median)) / sum(map(count_tokens, some))
    typical = run_on_meta(job, some)
    memory.trim()
    before, _ = resident()
    seconds = times * seconds_of(typical, dtype, device)
    memory.trim()
    after, _ = resident()
    rates.kept += max(0, after - before)
    if len(largest) > SOME:
        ledger = run_on_meta(job, sorted(largest, key=count_tokens)[-SOME:])
    elif largest is median:
        ledger = typical
    else:
        ledger = run_on_meta(job, largest)
    _, libraries = resident()  # of which the timing has read in as much as a run does
    return Plan(
        config=job.config,
        kinds=ledger.at_peak(),
        held=ledger.peak,
        heap=ledger.heap.most,
        workspace=rates.kept,
        loading=loading,
        process=own + libraries,
        by_module=dict(ledger.saved),
        largest=max(map(count_tokens, largest)),
        tokens=sum(map(count_tokens, median)),
        micro_batches=len(median),
        flops=round(times * sum(typical.flops.values())),
        seconds=seconds,
        trained=sum(p.numel() for p in job.parameters),
        weights=job.model.size(),
        device=device,
        dtype=dtype,
    )


def sizes(model: Model) -> list[int]:
    """Bytes of each weight."""
    return [t.nbytes for t in (*model.parameters(), *model.buffers())]


def count_tokens(micro: list[Sequence]) -> int:
    """Tokens of a micro-batch."""
    return sum(map(len, micro))


def steps_of(job: Job, sequences: list[Sequence]) -> Iterator[list[list[Sequence]]]:
    """The micro-batches of each step of the first epoch, of the first LOOK steps at most."""
    config = job.config
    shuffled = order(len(sequences), config.seed, 0)
    for step, numbers in enumerate(shuffled.split(config.batch)[:LOOK]):
        chosen = [sequences[i] for i in numbers.tolist()]
        if hasattr(job.task, "at_step"):
            chosen = job.task.at_step(chosen, config.seed, step)
        if micros := job.micro_batches(chosen):
            yield micros


def run_on_meta(job: Job, micros: list[list[Sequence]]) -> Ledger:
    """Two steps on these micro-batches; of the second, in which the optimizer's state is there, the ledger.

    Raises InputError for a task or a model that asks for numbers, which tensors without memory have not.
    """
    ledger = Ledger(job.model)
    try:
        with without_compiler():
            two_steps(job, micros, ledger)
    except (NotImplementedError, RuntimeError) as e:
        if "meta" not in str(e).lower():
            raise
        raise InputError(f"--task {job.config.task} reads the numbers of a batch, and has no plan ({e})") from e
    return ledger


@contextmanager
def without_compiler() -> Iterator[None]:
    """Keeps PyTorch from importing its compiler, which takes two seconds and 70 MB and compiles nothing here.

    What it knows of shapes on the meta device is in Python, and each such function, at its first call, is told to the
    compiler as one to leave alone. Meanwhile a module that takes no notice of that stands there in its place.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = torch._dynamo = NoCompiler(name)
    try:
        yield
    finally:
        NoCompiler.leave()


class NoCompiler(ModuleType):
    """What is asked for instead of torch._dynamo."""

    def disable(self, function: Callable, *_, **__) -> Callable:
        """The function, which nobody compiles."""
        return function

    def __getattr__(self, attribute: str):
        """Anything else is the real one's, which then takes its place."""
        if attribute.startswith("__"):  # of modules in general
            raise AttributeError(attribute)
        self.leave()
        return getattr(importlib.import_module(self.__name__), attribute)

    @staticmethod
    def leave() -> None:
        """Gives back the place, if the real one does not have it yet."""
        if isinstance(sys.modules.get("torch._dynamo"), NoCompiler):
            del sys.modules["torch._dynamo"], torch._dynamo


def two_steps(job: Job, micros: list[list[Sequence]], ledger: Ledger) -> None:
    """On tensors without memory, while the ledger looks on."""
    with ledger:
        for step in range(2):
            ledger.restart()
            for micro in micros:
                batch = pack(micro)
                shapes = replace(batch.to(META), offsets=batch.offsets)  # whose values say how long sequences are
                ledger.own(BATCH, (value for value in vars(shapes).values() if isinstance(value, Tensor)))
                accumulate(job, shapes, Noise(job.config.seed, step, shapes.keys), 1)
                ledger.own(GRADIENTS, (p.grad for p in job.parameters if p.grad is not None))
            update(job, skip=torch.zeros((), device=META))
            for state in job.optimizer.state.values():
                ledger.own(MOMENTS, state.values())
            job.optimizer.zero_grad()


def write_ledger(run: Path, plan: Plan) -> None:
    """Writes ledger.json, the forecast of a run beside what was measured in it. Raises OSError."""
    text = json.dumps({"forecast": as_json(plan), "measured": measured(run, plan.device)}, indent=2)
    files.write_text(run / "ledger.json", text + "\n")


def as_json(plan: Plan) -> dict:
    """The plan for programs: bytes, FLOPs, seconds, and the options that --fit chooses."""
    fields = (
        "memory",
        "seconds",
        "kinds",
        "held",
        "heap",
        "workspace",
        "process",
        "largest",
        "tokens",
        "micro_batches",
        "flops",
        "by_module",
    )
    found = {name: getattr(plan, name) for name in fields}
    return found | {"options": {name: getattr(plan.config, name) for name in FITTED}}


# ---- --fit


def fitted(config: TrainConfig) -> Plan:
    """The plan of a run that takes no more than --fit; its config has such --tokens, --recompute and --base.

    What is chosen, and what it costs, is said. Raises InputError, before any weight is read, where nothing is enough.
    """
    limit = size_of(config.fit)
    config = replace(config, fit="")
    subject = read_subject(config)
    asked = plan_for(subject, config)
    if with_room(asked.memory) <= limit:
        say(f"--fit: it takes about {megabytes(asked.memory)} MB as it is")
        return asked

    _, libraries = resident()
    process = subject.own + libraries
    least = asked.memory, asked.config
    for base in bases(config):
        if base != config.base:
            subject.model, _ = load_shapes(replace(config, base=base), subject.labels)
            subject.loading = sum(sizes(subject.model))
        found = []
        for recompute in sorted({config.recompute, True}):
            options, size = most_tokens(subject, replace(config, base=base, recompute=recompute), limit, process)
            least = min(least, (process + size, options), key=lambda pair: pair[0])
            if with_room(process + size) <= limit:
                found.append(plan_for(subject, options))
        if found:
            best = min(found, key=lambda plan: plan.seconds)
            say(f"--fit: {difference(asked, best)}")
            return best
    needed, options = least
    raise InputError(
        f"--fit: expected at least {megabytes(with_room(needed))} MB, which {options_of(options)} takes; "
        f"found {megabytes(limit)}"
    )


def fit_aside(config: TrainConfig) -> TrainConfig:
    """The configuration as `fitted` chooses it, in a process of its own, whose memory is not the run's.

    Raises InputError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--fit is for a run of one process; expected --tokens, which `minift plan --fit` finds")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(config.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", "minift", "plan", "--json", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    *_, last = done.stderr.strip().splitlines() or [""]
    if done.returncode:
        raise InputError(last.removeprefix("minift: error: "))
    say(last)
    chosen = json.loads(done.stdout.splitlines()[-1])
    return replace(config, fit="", **chosen["options"])


def bases(config: TrainConfig) -> list[str]:
    """How frozen weights might be kept: as asked for, else in fewer bits, where what is frozen stays so."""
    found = [config.base]
    if method_named(config.method).base != "unpacked" and config.init != "random":
        smaller = ["bf16"] if config.base in ("auto", "fp32") else []
        smaller += BASES
        found += [base for base in smaller if base != config.base]
    return found


def with_room(memory: float) -> float:
    """What a run may take whose forecast is `memory`."""
    return OFF * memory + ALWAYS


def most_tokens(subject: Subject, config: TrainConfig, limit: int, process: int) -> tuple[TrainConfig, int]:
    """(the options with the most --tokens that fit into `limit` bytes, what model and step take with them).

    process: bytes of everything else. Where nothing fits, the fewest tokens: as many as the longest sequence has.
    """
    _, steps = job_for(subject, replace(config, tokens=1))
    low = max(count_tokens(micro) for micros in steps for micro in micros)
    high = max(sum(map(count_tokens, micros)) for micros in steps)
    if config.tokens:  # a step that was asked to be split is not made larger
        high = max(low, min(high, config.tokens))

    best = replace(config, tokens=low)
    size = bytes_for(subject, best)
    if with_room(process + size) > limit:
        return best, size
    middle = high
    while middle > low:
        options = replace(config, tokens=middle)
        found = bytes_for(subject, options)
        if with_room(process + found) <= limit:
            best, size, low = options, found, middle
        else:
            high = middle
        middle = round((low * high) ** 0.5) if high > low * STEP else low
    return best, size


def bytes_for(subject: Subject, config: TrainConfig) -> int:
    """What model and step take, without the process: of the two largest micro-batches of the step with the largest."""
    job, steps = job_for(subject, config)
    largest = max(steps, key=lambda micros: max(map(count_tokens, micros)))
    ledger = run_on_meta(job, sorted(largest, key=count_tokens)[-2:])
    return max(ledger.heap.most, subject.loading) if subject.device.type == "cpu" else ledger.peak


def difference(asked: Plan, chosen: Plan) -> str:
    """What was chosen instead, and what it costs, in words."""
    slower = 100 * (chosen.seconds / asked.seconds - 1)
    return (
        f"{options_of(chosen.config)} takes about {megabytes(chosen.memory)} MB instead of {megabytes(asked.memory)}, "
        f"and {chosen.seconds:.2f} s a step instead of {asked.seconds:.2f} ({slower:+.0f} %)"
    )


def options_of(config: TrainConfig) -> str:
    """The options that --fit chooses, as they are typed."""
    words = [f"--tokens {config.tokens}"]
    if config.recompute:
        words.append("--recompute")
    if config.base != "auto":
        words.append(f"--base {config.base}")
    return " ".join(words)


# ---- in words


def describe(plan: Plan) -> list[str]:
    """The plan in lines: a table of memory, then what else it says."""
    where = "on the GPU" if plan.device.type == "cuda" else "in memory"
    parts = {name: size for name, size in plan.kinds.items() if size}
    if plan.device.type == "cpu":
        parts["holes in the heap"] = plan.heap - plan.held
        parts["libraries' working memory"] = plan.workspace
        if plan.loading > plan.heap + plan.workspace:
            parts["more, while it loads"] = plan.loading - plan.heap - plan.workspace
        parts["Python, torch, data"] = plan.process
    rows = [(name, megabytes(size), f"{100 * size / plan.memory:.0f} %") for name, size in parts.items()]
    rows.append(("all, at the peak", megabytes(plan.memory), "100 %"))
    lines = table_lines((where, "MB", "share"), rows, "<>>")
    at_once = f"at most {plan.config.tokens:,} at once" if plan.config.tokens else "all at once"
    bytes_bound, seconds_bound = plan.bound
    lines += [
        "",
        f"weights   {plan.trained:,} of {plan.weights:,} learn",
        f"a step    {plan.tokens:,} tokens in the median, {at_once}",
        f"products  {plan.flops / 1e9:,.1f} GFLOP a step, in {str(plan.dtype)[6:]}",
        f"time      about {plan.seconds:.3g} s a step",
        *room_for(plan),
        f"bound     {megabytes(bytes_bound)} MB of weights and optimizer, {seconds_bound:.3g} s of products at their",
        "          best rate here: no implementation does with less",
    ]
    return lines


def room_for(plan: Plan) -> list[str]:
    """Whether it fits, and with how many tokens at once at most: a line, where that was looked at."""
    if not plan.free:
        return []
    free = f"the {megabytes(plan.free)} MB that are free here"
    if not plan.most:
        return [f"room      none in {free}: --fit tells what would do"]
    return [f"room      up to --tokens {plan.most} in {free}"]


def megabytes(size: int) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:,.1f}"
