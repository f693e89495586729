"""What a run will take, before anything is allocated: `minift plan`.

The model is made without weights, on the meta device, where a tensor has a shape and no memory. Two steps of training
run there, on the largest micro-batch of the first epoch, and a ledger (measure/ledger.py) sees what they hold and
multiply. So nothing is computed by formulas that could be out of date: what the code does is what is counted.

Memory is that of the process: Python, torch and the data as they are here, and the heap with its holes. Seconds are the
products' and the kernels' bytes at the rates of a product and of a copy, both measured here.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .adapters import changes_base, saved_as
from .config import TrainConfig
from .data.batch import Sequence, order, pack
from .engine.distributed import ALONE
from .engine.precision import choose_device, choose_dtype
from .errors import table_lines
from .measure.ledger import BATCH, GRADIENTS, MOMENTS, Ledger
from .measure.track import resident
from .models import check_length
from .ops import native, sources
from .ops.dropout import Noise
from .ops.linear import product
from .runs import read_training, set_aside, tokenise_texts
from .setup import Engine, Job, default_tokens, load_model, make_job
from .tasks import task_named
from .training import accumulate, update

LOOK = 1000  # steps whose micro-batches are looked at
META = torch.device("meta")
MEASURED = 0.5  # seconds for a rate


@dataclass
class Plan:
    """What a run takes when it takes most; bytes, FLOPs, seconds."""

    kinds: dict[str, int]  # bytes by kind
    held: int  # their sum
    heap: int  # what the heap grows to for them
    loading: int  # bytes before the first step: the weights as they are loaded, and the largest of them once more
    process: int  # bytes of this process, without a model
    by_module: dict[str, int]  # of what is saved for backward, which module left how much
    flops: int  # of the products of the largest step
    moved: int  # bytes that its kernels read and write
    tokens: int  # of the largest micro-batch
    at_once: int  # the limit of tokens in a micro-batch, 0: none
    micro_batches: int  # of the step
    trained: int  # weights that learn
    weights: int
    device: torch.device
    dtype: torch.dtype
    product_rate: float  # FLOP/s
    copy_rate: float  # bytes/s, read and written

    @property
    def memory(self) -> int:
        """Bytes of the process at its peak; on a GPU those of the GPU."""
        return self.process + max(self.heap, self.loading) if self.device.type == "cpu" else self.held

    @property
    def seconds(self) -> float:
        """Of the largest step."""
        return self.flops / self.product_rate + self.moved / self.copy_rate


def forecast(config: TrainConfig) -> Plan:
    """The plan of a checked configuration. Raises InputError."""
    task = task_named(config.task)
    whole = read_training(config, config.data)
    labels = task.label_names(whole, config.labels)
    examples, _ = set_aside(config, whole)
    method = saved_as(config.method) if changes_base(config.method) else config.method  # the shapes are the same
    model, tokenizer = load_model(replace(config, init="shapes", method=method), labels)
    weights = [t.nbytes for t in (*model.parameters(), *model.buffers())]
    tokenise_texts(tokenizer, ALONE, examples)
    sequences = task.encode(examples, model, tokenizer, check_length(model, config.max_length))

    device, _ = choose_device(config.device)
    dtype, _ = choose_dtype(config.precision, device)
    native.use(config.kernels, device)
    config = replace(config, tokens=config.tokens or default_tokens(model, device))
    job = make_job(model, config, Engine(META, dtype))
    micros = largest_step(job, sequences)
    product_rate, copy_rate = rates(dtype, device)
    process = resident_when_running(config)
    ledger = run_on_meta(job, micros)
    return Plan(
        kinds=ledger.at_peak(),
        held=ledger.peak,
        heap=ledger.heap.most,
        loading=sum(weights) + max(weights),
        process=process,
        by_module=dict(ledger.saved),
        flops=sum(ledger.flops.values()),
        moved=sum(ledger.moved.values()),
        tokens=max(sum(map(len, micro)) for micro in micros),
        at_once=config.tokens,
        micro_batches=len(micros),
        trained=sum(p.numel() for p in job.parameters),
        weights=model.size(),
        device=device,
        dtype=dtype,
        product_rate=product_rate,
        copy_rate=copy_rate,
    )


def largest_step(job: Job, sequences: list[Sequence]) -> list[list[Sequence]]:
    """The micro-batches of the step that has the largest of them, in the first epoch."""
    return max(steps_of(job, sequences), key=lambda micros: max(sum(map(len, micro)) for micro in micros))


def steps_of(job: Job, sequences: list[Sequence]) -> Iterator[list[list[Sequence]]]:
    """The micro-batches of each step of the first epoch, of the first LOOK steps at most."""
    config = job.config
    shuffled = order(len(sequences), config.seed, 0)
    for step, numbers in enumerate(shuffled.split(config.batch)[:LOOK]):
        chosen = [sequences[i] for i in numbers.tolist()]
        if hasattr(job.task, "at_step"):
            chosen = job.task.at_step(chosen, config.seed, step)
        yield job.world.micro_batches(chosen, config.tokens)


def run_on_meta(job: Job, micros: list[list[Sequence]]) -> Ledger:
    """Two steps on these micro-batches; of the second, in which the optimizer's state is there, the ledger."""
    ledger = Ledger(job.model)
    with ledger:
        for step in range(2):
            ledger.restart()
            for micro in micros:
                batch = pack(micro)
                shapes = replace(batch.to(META), offsets=batch.offsets)  # whose values say how long sequences are
                ledger.own(BATCH, (value for value in vars(shapes).values() if isinstance(value, torch.Tensor)))
                accumulate(job, shapes, Noise(job.config.seed, step, shapes.keys), 1)
                ledger.own(GRADIENTS, (p.grad for p in job.parameters if p.grad is not None))
            update(job, skip=torch.zeros((), device=META))
            for state in job.optimizer.state.values():
                ledger.own(MOMENTS, state.values())
            job.optimizer.zero_grad()
    return ledger


def resident_when_running(config: TrainConfig) -> int:
    """Bytes of this process with everything that a run loads: kernels, and libraries of products."""
    if native.mode != "reference" and config.device != "cuda":
        for path in sources.folder().glob("cpu/*.cpp"):
            native.load_kernel(path.stem)
    return resident()


def rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a product of the size that layers have, bytes/s of a copy)."""
    x = torch.randn(512, 768, dtype=dtype, device=device)
    w = torch.randn(3072, 768, dtype=dtype, device=device)
    large = torch.zeros(1 << 24, device=device)
    other = torch.zeros_like(large)
    flops = 2 * x.shape[0] * w.numel() / best(lambda: product(x, w), device)
    return flops, 2 * large.nbytes / best(lambda: other.copy_(large), device)


def best(function, device: torch.device) -> float:
    """Seconds of a function in its median run, out of those that fit into MEASURED."""
    found = []
    function()
    end = time.perf_counter() + MEASURED
    while time.perf_counter() < end or not found:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]


def describe(plan: Plan) -> list[str]:
    """The plan in lines: a table of memory, then what else it says."""
    where = "on the GPU" if plan.device.type == "cuda" else "in memory"
    rows = [(name, megabytes(size), share(size, plan.memory)) for name, size in plan.kinds.items() if size]
    if plan.device.type == "cpu":
        rows.append(("holes in the heap", megabytes(plan.heap - plan.held), share(plan.heap - plan.held, plan.memory)))
        if plan.loading > plan.heap:
            more = plan.loading - plan.heap
            rows.append(("more, while it loads", megabytes(more), share(more, plan.memory)))
        rows.append(("Python, torch, data", megabytes(plan.process), share(plan.process, plan.memory)))
    rows.append(("all, at the peak", megabytes(plan.memory), "100 %"))
    lines = table_lines((where, "MB", "share"), rows, "<>>")
    limit = f"at most {plan.at_once:,}" if plan.at_once else "no limit"
    parts = f"{plan.micro_batches} micro-batch{'es' if plan.micro_batches > 1 else ''}"
    rate = f"{plan.product_rate / 1e9:,.0f} a second in {str(plan.dtype)[6:]}"
    lines += [
        "",
        f"weights   {plan.trained:,} of {plan.weights:,} learn",
        f"tokens    {plan.tokens:,} at once ({limit}), in {parts} of the largest step",
        f"products  {plan.flops / 1e9:,.1f} GFLOP in it, {rate}",
        f"time      about {plan.seconds:.2f} s for it",
    ]
    return lines


def megabytes(size: int) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:,.1f}"


def share(size: int, whole: int) -> str:
    """A part in per cent."""
    return f"{100 * size / whole:.0f} %"
