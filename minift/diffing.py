"""Two runs side by side: what is different in their weights, and in what they say of the lines of a file.

The use of it: a run, and the same run `--without` some of its examples, show what these examples taught. Order and
dropout of all others are the same, so two equal runs have equal weights, to the bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters.targets import candidates
from .checkpoints import loading
from .config import DiffConfig
from .data.batch import Batch
from .engine.precision import choose_device
from .errors import InputError, table_lines
from .evaluation import batches, measure
from .models import LAST, Model, check_length
from .ops.dropout import SILENT
from .tasks import task_of

LAYERS = 12  # that are shown, those with most of the difference
LINES = 8  # of the file that are shown
TOKENS = 1024  # at once


@dataclass
class OnFile:
    """What two models say of the examples of a file."""

    metrics: list[dict]  # of each model
    largest: float  # difference of two logits
    mean: float  # of the absolute differences
    changed: int  # targets for which another class or token is the likeliest
    targets: int
    losses: list[tuple[int, float, float]]  # of each example: its number, its mean loss by each model


@torch.no_grad()
def weights_apart(first: Model, second: Model) -> list[tuple[str, float, float]]:
    """(layer by its hub name, |W2 - W1| / |W1|, its share of the sum of all |W2 - W1|^2), the largest share first.

    Of an adapted layer W is the matrix with its update. Raises InputError for models of different shapes.
    """
    layers = [compared_layers(model) for model in (first, second)]
    if layers[0].keys() != layers[1].keys():
        odd = sorted(layers[0].keys() ^ layers[1].keys())
        raise InputError(f"the models have other layers ({odd[0]}...); expected two runs on one model")
    found = []
    for name in layers[0]:
        # clones, for the memory of an unpacked matrix may be lent (layers/packed.py)
        one, two = (side[name].matrix(torch.float32).clone() for side in layers)
        if one.shape != two.shape:
            raise InputError(f"{name} is {tuple(one.shape)} and {tuple(two.shape)}; expected two runs on one model")
        apart = (two - one).norm().item()
        found.append((name, apart / max(one.norm().item(), 1e-30), apart**2))
    total = sum(square for _, _, square in found) or 1.0
    return sorted(((name, apart, square / total) for name, apart, square in found), key=lambda row: -row[2])


def compared_layers(model: Model) -> dict[str, nn.Module]:
    """Each linear layer, with what is wrapped around it, and the head's last, by its hub name."""
    names = candidates(model)
    outermost = {name: hub for name, hub in names.items() if not any(name.startswith(f"{other}.") for other in names)}
    outermost[LAST] = model.hub_name(LAST)
    return {hub: model.get_submodule(name) for name, hub in outermost.items()}


@torch.no_grad()
def on_file(first: Model, second: Model, tokenizer, config: DiffConfig) -> OnFile:
    """What both say of a file, whose text the first one's tokenizer splits. Raises InputError."""
    task = task_of(first)
    examples = task.stream(config.data, config.columns, header=config.header)
    labels = task.judge(examples, first, tokenizer)
    sequences = list(task.encoded(examples, labels, first, tokenizer, check_length(first, config.max_length)))
    metrics = [measure(model, sequences).result() for model in (first, second)]

    largest, total, count, changed = 0.0, 0.0, 0, 0
    losses: list[tuple[int, float, float]] = []
    group_of = iter(sequences)
    for batch in batches(sequences, TOKENS):
        (one, own), (two, other) = (judged(model, batch) for model in (first, second))
        apart = (two - one).abs()
        largest = max(largest, apart.max().item())
        total += apart.sum(dtype=torch.float64).item()
        count += apart.numel()
        changed += int((one.argmax(-1) != two.argmax(-1)).sum())
        begin = 0
        for _ in range(batch.n_examples):
            sequence = next(group_of)
            end = begin + len(sequence.targets)
            if end > begin:
                means = own[begin:end].mean().item(), other[begin:end].mean().item()
                losses.append((sequence.number, *means))
            begin = end
    return OnFile(metrics, largest, total / max(1, count), changed, sum(len(s.targets) for s in sequences), losses)


def judged(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits (M, V), loss of each target (M,)) of a batch."""
    batch = batch.to(model.device)
    h = model.head.features(model(batch), SILENT)
    logits = model.last(h).float()
    return logits, torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")


def compare(config: DiffConfig) -> Iterator[str]:
    """The lines that `minift diff` prints. Raises InputError."""
    if len(config.runs) != 2:
        raise InputError(f"found {len(config.runs)} runs; expected two: minift diff RUN RUN")
    device, _ = choose_device(config.device)
    loaded = [loading.load(run, config.task, fresh_head=False, device=device) for run in config.runs]
    (first, tokenizer), (second, _) = loaded
    rows = weights_apart(first, second)
    shown = [(name, f"{apart:.2e}", f"{share:.1%}") for name, apart, share in rows[:LAYERS]]
    yield from table_lines(("layer", "|W2 - W1| / |W1|", "share"), shown, "<>>")
    if len(rows) > LAYERS:
        yield f"and {len(rows) - LAYERS} layers more"
    if not config.data:
        return
    if tokenizer is None:
        raise InputError(f"{config.runs[0]}: no tokenizer; expected one to read {config.data} with")
    found = on_file(first, second, tokenizer, config)
    yield ""
    numbers = [name for name, value in found.metrics[0].items() if isinstance(value, float)]
    table = [(name, *(f"{metrics[name]:.4f}" for metrics in found.metrics)) for name in numbers]
    yield from table_lines((Path(config.data).name, "first", "second"), table, "<>>")
    yield f"logits: {found.largest:.3g} apart at most, {found.mean:.3g} on average"
    yield f"another answer for {found.changed:,} of {found.targets:,} targets"
    hardest = sorted(found.losses, key=lambda row: -abs(row[2] - row[1]))[:LINES]
    if hardest and hardest[0][1] != hardest[0][2]:
        table = [(f"{number:,}", f"{one:.4f}", f"{two:.4f}", f"{two - one:+.4f}") for number, one, two in hardest]
        yield ""
        yield from table_lines(("example", "loss, first", "second", "change"), table, ">>>>")
