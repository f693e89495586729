"""The training loop.

A step takes `--batch` examples in the order that (seed, epoch) gives, splits them into micro-batches of `--tokens`
tokens, sums the loss over all of them, divides by the number of targets of the whole step, clips, and updates. So
micro-batches change memory, and nothing else.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import data, hub
from .batch import Sequence, order, pack, split
from .config import InputError, TrainConfig
from .data import Example
from .evaluate import check_length, measure
from .models import Model
from .ops.dropout import Noise
from .optim import clip, make_optimizer, schedule, warmup_steps
from .precision import choose_device
from .tasks import TASKS
from .tokenizer import Tokenizer
from .track import Tracker, peak_memory, say


@dataclass
class Run:
    """What a finished run leaves: its folder, and what was measured at its end."""

    out: Path
    steps: int
    seconds: float
    model: Path  # the folder to take away: best/ where there was a validation, else last/
    metrics: dict  # of the best validation, or empty


def read_examples(config: TrainConfig) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples of a configuration; the second is empty without --valid. Raises InputError."""
    examples, valid = data.read(config.data, config.columns), []
    if config.valid:
        try:
            fraction = float(config.valid)
        except ValueError:
            valid = data.read(config.valid, config.columns)
        else:
            examples, valid = data.split(examples, fraction, config.seed)
    return data.sample(examples, config.limit, config.seed) if config.limit else examples, valid


def train(
    model: Model, tokenizer: Tokenizer, config: TrainConfig, examples: tuple[list[Example], list[Example]] | None = None
) -> Run:
    """Trains `model` in place as `config` says (its `model` option is only recorded) and writes the run folder.

    examples: what read_examples gave, to save reading twice. Raises InputError before anything is written,
    FloatingPointError when the loss is no longer finite.
    """
    config.check()
    out = Path(config.out)
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out}: is there already; expected a new or empty folder")
    device, why = choose_device(config.device)
    say(f"device {device.type} ({why}), float32")
    max_length = check_length(model, config.max_length)
    encoded = [
        TASKS[config.task].encode(part, model, tokenizer, max_length) for part in examples or read_examples(config)
    ]
    describe(model, config, encoded, max_length)

    out.mkdir(parents=True, exist_ok=True)
    config.save(out / "config.json")
    model.settings["minift"] = {"max_length": max_length}  # eval and predict cut where training cut
    return loop(model.to(device), tokenizer, config, *encoded)


def loop(
    model: Model, tokenizer: Tokenizer, config: TrainConfig, sequences: list[Sequence], valid: list[Sequence]
) -> Run:
    """Every step of a run."""
    out, start = Path(config.out), time.perf_counter()
    per_epoch = math.ceil(len(sequences) / config.batch)
    total = config.steps or per_epoch * config.epochs
    every = per_epoch if config.eval_every == "epoch" else int(config.eval_every)
    warmup = warmup_steps(config.warmup, total)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    name, better = TASKS[config.task].Metrics.best
    best = {}

    with Tracker(out, total) as tracker:
        for step in range(total):
            epoch, i = divmod(step, per_epoch)
            if i == 0:
                shuffled = order(len(sequences), config.seed, epoch).tolist()
            chosen = [sequences[j] for j in shuffled[i * config.batch : (i + 1) * config.batch]]
            lr = config.lr * schedule(config.schedule, step, total, warmup)
            values = train_step(model, optimizer, chosen, config, step, lr)
            evaluated = None
            if valid and ((step + 1) % every == 0 or step + 1 == total):
                evaluated = measure(model, valid)
                found = "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items() if k != "examples")
                say(f"step {step + 1} valid: {found}")
                if not best or better(evaluated[name], best[name]) != best[name]:
                    best = evaluated
                    hub.save(model, tokenizer, out / "best")
            tracker.step({**values, "train/epoch": (step + 1) / per_epoch, "train/global_step": step + 1}, evaluated)
    hub.save(model, tokenizer, out / "last")
    return Run(out, total, time.perf_counter() - start, out / ("best" if best else "last"), best)


def train_step(
    model: Model, optimizer: torch.optim.Optimizer, sequences: list[Sequence], config: TrainConfig, step: int, lr: float
) -> dict[str, float]:
    """One update from `sequences` at learning rate `lr`; returns the step's values by their names in metrics.jsonl."""
    start, loss_sum, correct = time.perf_counter(), 0.0, 0
    n_targets = sum(len(s.targets) for s in sequences)  # of the whole step, before any backward
    for micro in split(sequences, config.tokens):
        batch = pack(micro).to(model.device)
        loss, right = TASKS[config.task].loss(model, batch, Noise(config.seed, step, batch.keys))
        (loss / n_targets).backward()
        loss_sum, correct = loss_sum + loss.item(), correct + right.item()
    if not math.isfinite(loss_sum):
        numbers = ", ".join(str(s.number) for s in sequences)
        raise FloatingPointError(
            f"the loss of step {step + 1} is {loss_sum}; its examples are {numbers} (counted from 0)"
        )
    norm = clip([p for p in model.parameters() if p.requires_grad], config.clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # keeps the memory: it is needed again in the next step
    n_tokens = sum(map(len, sequences))
    return {
        "train/loss": loss_sum / n_targets,
        "train/accuracy": correct / n_targets,
        "train/grad_norm": norm,
        "train/learning_rate": lr,
        "train/tokens": n_tokens,
        "train/tokens_per_second": n_tokens / (time.perf_counter() - start),
        "train/peak_memory": peak_memory(),
    }


def describe(model: Model, config: TrainConfig, encoded: list[list[Sequence]], max_length: int) -> None:
    """Says what is about to happen."""
    everything = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens, cut = [len(s) for s in encoded[0]], sum(s.cut for s in encoded[0])
    mean = sum(tokens) / len(tokens)
    say(f"{trainable:,} of {everything:,} parameters are trained; labels: {', '.join(model.labels)}")
    say(
        f"{len(tokens):,} examples to train on, {len(encoded[1]):,} to validate on; {mean:.1f} tokens each on average, "
        f"{config.batch * mean:,.0f} a step; {cut:,} cut to {max_length} tokens"
    )
