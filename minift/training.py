"""The training loop: open this first.

A step takes `--batch` examples in the order that (seed, epoch) gives, splits them into micro-batches of `--tokens`
tokens, sums the loss over all of them, divides by the number of targets of the whole step, clips, and updates. The
micro-batch size changes memory only; the number of processes and a resume change nothing.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoints import resume, saving
from .config import TrainConfig
from .data.batch import Sequence, order, pack
from .data.tokenizer import Tokenizer
from .engine.graph import Graphs
from .engine.optim import clip, schedule, warmup_steps
from .evaluation import measure
from .measure.track import (
    Tracker,
    make_loggers,
    peak_memory,
    say,
    stop_signals,
)
from .models import Model
from .ops.dropout import Noise
from .ops.rematerialise import rematerialise
from .setup import Job, prepare_run, recorded, resume_run
from .tasks import TASKS


@dataclass
class Run:
    """What a finished run leaves: its folder, and what was measured at its end."""

    out: Path
    steps: int
    seconds: float
    model: Path  # the folder to take away: best/ where there was a validation, else last/
    metrics: dict  # of the best validation, or empty


class Interrupted(Exception):
    """The run was asked to stop, and did after a checkpoint; `number` is the signal's."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"stopped by {signal.Signals(number).name}; the checkpoint is {folder}")
        self.number = number


def train(model: Model, tokenizer: Tokenizer, config: TrainConfig, examples: tuple[list, list] | None = None) -> Run:
    """Trains `model` in place as `config` says (its `model` option is only recorded) and writes the run folder.

    examples: what read_examples gave, to save reading twice. Raises InputError before anything is written,
    FloatingPointError when the loss is no longer finite, Interrupted after SIGINT or SIGTERM, OSError on a full disk.
    """
    job, sequences, valid = prepare_run(model, tokenizer, config, examples)
    return loop(job, tokenizer, sequences, valid)


def loop(job: Job, tokenizer: Tokenizer, sequences: list[Sequence], valid: list[Sequence]) -> Run:
    """Every step of a run, from the beginning or from its latest checkpoint."""
    config, world, out, start = job.config, job.world, Path(job.config.out), time.perf_counter()
    per_epoch = math.ceil(len(sequences) / config.batch)
    total = config.steps or per_epoch * config.epochs
    warmup = warmup_steps(config.warmup, total)
    state = {"step": 0, "best": {}, "stale": 0, "data": resume.fingerprint(sequences)}
    state["valid"] = resume.fingerprint(valid)
    state["base"] = job.base
    state["options"] = dataclasses.asdict(recorded(config, job.model))
    if config.resume:
        state = resume_run(job, state, total)

    def due(every: str) -> bool:
        """Whether something is done `every` epoch or N steps, and now."""
        n = per_epoch if every == "epoch" else int(every)
        return state["step"] == total or n > 0 and state["step"] % n == 0

    loggers = make_loggers(config.log, out, dataclasses.asdict(config)) if world.first else []
    with Tracker(out, total, state["step"], world.first, loggers) as tracker, stop_signals() as job.caught:
        for step in range(state["step"], total):
            if config.patience and state["stale"] >= config.patience:
                say(f"no better for {state['stale']} validations: stopped after step {step}")
                break
            epoch, i = divmod(step, per_epoch)
            chosen = order(len(sequences), config.seed, epoch)[i * config.batch : (i + 1) * config.batch].tolist()
            lr = config.lr * schedule(config.schedule, step, total, warmup)
            values, stop = train_step(job, [sequences[j] for j in chosen], step, lr)
            state["step"] = step + 1
            evaluated = validate(job, tokenizer, valid, state) if valid and due(config.eval_every) else None
            tracker.step({**values, "train/epoch": (step + 1) / per_epoch, "train/global_step": step + 1}, evaluated)
            if stop or due(config.save_every):
                check_finite(job, step + 1)
                saved = state | {"scaler": job.scaler.state_dict()}
                resume.save(out, job.model, job.optimizer, saved, config.keep, world.first)
            world.wait()
            if stop:
                raise Interrupted(stop, resume.latest(out))
        check_finite(job, state["step"])
        saving.write_model(job.model, tokenizer, out / "last", world.first)
        model = out / ("best" if state["best"] else "last")
        tracker.finish(model)
    return Run(out, state["step"], time.perf_counter() - start, model, state["best"])


def train_step(job: Job, sequences: list[Sequence], step: int, lr: float) -> tuple[dict[str, float], int]:
    """One update from `sequences` at learning rate `lr`.

    Returns the step's values by their names in metrics.jsonl, and the signal that a process was asked to stop by, or 0.
    """
    model, config, world, start = job.model, job.config, job.world, time.perf_counter()
    n_targets = sum(len(s.targets) for s in sequences)  # of the whole step, before any backward
    sums = torch.tensor([0, 0, signal.SIGINT in job.caught, signal.SIGTERM in job.caught], dtype=torch.float64)
    micros = world.micro_batches(sequences, config.tokens)
    if config.graph:
        job.graphs = job.graphs or Graphs(job, model.settings["minift"]["max_length"])
        sums[0], sums[1], norm = job.graphs.step(micros, Noise(config.seed, step), n_targets, lr)
    for micro in () if config.graph else micros:
        batch = pack(micro).to(model.device)
        noise = Noise(config.seed, step, batch.keys)
        with rematerialise():
            loss, right = TASKS[config.task].loss(model, batch, noise, config.label_smoothing)
        job.scaler.scale(loss / max(1, n_targets)).backward()
        sums[0] += loss.item()
        sums[1] += right.item()
    loss_sum, right, interrupted, terminated = world.add_up(sums.to(model.device)).tolist()
    if not math.isfinite(loss_sum):
        numbers = ", ".join(str(s.number) for s in sequences)
        raise FloatingPointError(
            f"the loss of step {step + 1} is {loss_sum}; its examples, counted from 0: {numbers}; "
            f"the last checkpoint: {resume.latest(Path(config.out)) or 'none yet'}"
        )
    norm = norm if config.graph else update(job, lr)
    n_tokens = sum(map(len, sequences))
    values = {
        "train/loss": loss_sum / max(1, n_targets),
        "train/accuracy": right / max(1, n_targets),
        "train/grad_norm": norm if math.isfinite(norm) else None,
        "train/learning_rate": lr,
        "train/tokens": n_tokens,
        "train/tokens_per_second": n_tokens / (time.perf_counter() - start),
        "train/peak_memory": peak_memory(),
    }
    if job.scaler.is_enabled():
        values["train/loss_scale"] = job.scaler.get_scale()
    return values, signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0


def update(job: Job, lr: float) -> float:
    """Clips the gradients of all processes and updates the weights; returns the gradients' norm."""
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    job.world.add_gradients(parameters)
    job.scaler.unscale_(job.optimizer)
    norm = clip(parameters, job.config.clip)
    for group in job.optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    job.scaler.step(job.optimizer)  # float16: not where a gradient overflowed
    job.scaler.update()
    job.optimizer.zero_grad()
    return norm


def validate(job: Job, tokenizer: Tokenizer, valid: list[Sequence], state: dict) -> dict[str, float]:
    """The metrics of the validation examples; keeps the model in best/ if they are the best so far."""
    model, world = job.model, job.world
    name, better = TASKS[model.task].Metrics.best
    if world.sharded:  # every forward pass is a conversation of all: all measure all
        found = measure(model, valid)
        world.settle(model)
    else:
        found = measure(model, valid[world.rank :: world.size], add_up=world.add_up)
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the validation loss after step {state['step']} is {found['loss']}; "
            f"the last checkpoint: {resume.latest(Path(job.config.out)) or 'none yet'}"
        )
    best = state["best"]
    state["stale"] += 1
    if not best or is_better(found, best, name, better):
        check_finite(job, state["step"])
        # an infinite perplexity, of a finite loss, has no place in a checkpoint's JSON
        state["best"] = {key: value for key, value in found.items() if math.isfinite(value)}
        state["stale"] = 0
        saving.write_model(model, tokenizer, Path(job.config.out, "best"), world.first)
    say(f"step {state['step']} valid: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items() if type(v) is float))
    return found


def is_better(found: dict, best: dict, name: str, better: Callable) -> bool:
    """Whether a validation is better by the metric `name`, or as good with a lower loss."""
    if found[name] != best[name]:
        return better(found[name], best[name]) == found[name]
    return found["loss"] < best["loss"]


def check_finite(job: Job, step: int) -> None:
    """Raises FloatingPointError where a trained weight or its moments are not finite: no such model is saved."""
    faults = []
    for name, p in resume.trained(job.model):
        for tensor in (p, *job.optimizer.state.get(p, {}).values()):
            tensor = tensor.detach()
            if hasattr(tensor, "to_local"):  # a process's own part of a sharded one
                tensor = tensor.to_local()
            if not resume.is_finite(tensor):
                faults.append(name)
    count = torch.tensor([len(faults)], dtype=torch.float64, device=job.model.device)
    if job.world.add_up(count).item():
        where = faults[0] if faults else "a weight of another process"
        raise FloatingPointError(
            f"after step {step} {where} is not finite, and nothing of it was saved; "
            f"the last checkpoint: {resume.latest(Path(job.config.out)) or 'none yet'}"
        )
