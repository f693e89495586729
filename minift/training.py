"""The training loop: open this first.

A step takes `--batch` examples in the order that (seed, epoch) gives, splits them into micro-batches of `--tokens`
tokens, sums the loss over all of them, divides by the number of targets of the whole step, clips, and updates. The
micro-batch size changes memory only; the number of processes and a resume change nothing. (One exception: on CUDA,
attention dropout in PyTorch's flash kernel draws another mask where a step is split otherwise, see ops/flash.py.)
"""

import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from . import runs
from .checkpoints import saving
from .config import TrainConfig
from .data.batch import Batch, Sequence, mean_losses, order, pack
from .data.tokenizer import Tokenizer
from .engine.graph import Graphs
from .engine.optim import clip, schedule, warmup_steps
from .measure.summary import Run
from .measure.track import Tracker, make_loggers, peak_memory, result_columns, say, stop_signal, stop_signals
from .models import Model
from .ops.dropout import Noise
from .ops.in_order import sums_in_order
from .ops.rematerialise import rematerialise
from .setup import Job


def train(
    model: Model, tokenizer: Tokenizer, config: TrainConfig, examples: list | None = None, valid: list | None = None
) -> Run:
    """Trains `model` in place as `config` says (its `model` option is only recorded) and writes the run folder.

    examples, valid: what to train and to validate on, where config names no files: lists of {"text": ..., "label": ...}
    or as else the lines of a .jsonl are. Raises InputError before anything is written, FloatingPointError when the loss
    is no longer finite, Interrupted after SIGINT or SIGTERM, OSError on a full disk.
    """
    read = None
    if examples is not None:
        read = runs.from_lists(model, config, examples, valid)
    job, sequences, held_out = runs.prepare_run(model, tokenizer, config, read)
    return loop(job, tokenizer, sequences, held_out)


def loop(job: Job, tokenizer: Tokenizer, sequences: list[Sequence], valid: list[Sequence]) -> Run:
    """Every step of a run, from the beginning or from its latest checkpoint."""
    start = time.perf_counter()
    config, world, out = job.config, job.world, Path(job.config.out)
    per_epoch = math.ceil(len(sequences) / config.batch)
    total = config.steps or per_epoch * config.epochs
    warmup = warmup_steps(config.warmup, total)
    without = runs.left_out(config, len(sequences))
    state = runs.begin_state(job, sequences, valid, total)  # or that of the latest checkpoint, with --resume

    def due(every: str) -> bool:
        """Whether something is done `every` epoch or N steps, and now."""
        n = per_epoch if every == "epoch" else int(every)
        return state["step"] == total or n > 0 and state["step"] % n == 0

    # a signal only leaves a note: the step that is under way is finished and saved before the run stops
    loggers = make_loggers(config, out) if world.first else []
    columns = result_columns(job.task)
    seen = runs.count_seen(config, len(sequences), state["step"])
    tracker = Tracker(out, total, columns, state["step"], seen, world.first, loggers)
    with tracker, stop_signals() as job.caught:
        for step in range(state["step"], total):
            if config.patience and state["stale"] >= config.patience:
                say(f"no better for {state['stale']} validations: stopped after step {step}")
                break

            # everything that differs from step to step is a function of its number: nothing else has to be saved
            epoch, i = divmod(step, per_epoch)
            shuffled = order(len(sequences), config.seed, epoch)
            numbers = shuffled[i * config.batch : (i + 1) * config.batch].tolist()
            chosen = [sequences[j] for j in numbers if j not in without]
            lr = config.lr * schedule(config.schedule, step, total, warmup)
            values, stop = train_step(job, chosen, step, lr)
            state["step"] = step + 1

            # validation comes before the checkpoint, which then holds its result
            evaluated = None
            if valid and due(config.eval_every):
                evaluated = runs.validate(job, tokenizer, valid, state)
            losses = values.pop("losses", {})
            values |= {"train/epoch": (step + 1) / per_epoch, "train/global_step": step + 1}
            tracker.step(values, evaluated)
            tracker.examples(epoch, losses)
            if stop or due(config.save_every):
                runs.save_checkpoint(job, state)
            world.wait()
            if stop:
                raise runs.Interrupted(stop, runs.last_checkpoint(config))

        runs.check_finite(job, state["step"])
        saving.write_model(job.model, tokenizer, out / "last", world.first)
        model = out / ("best" if state["best"] else "last")
        tracker.finish(model)
    seconds = time.perf_counter() - start
    return Run(out, state["step"], seconds, model, state["best"], state["details"])


def train_step(job: Job, sequences: list[Sequence], step: int, lr: float) -> tuple[dict[str, float], int]:
    """One update from `sequences` at learning rate `lr`; step: its number, from 0, which names its dropout.

    Returns the step's values by their names in metrics.jsonl, and the signal that a process was asked to stop by, or 0.
    Raises FloatingPointError where the loss is not finite; no weight has changed then.
    """
    start = time.perf_counter()
    if hasattr(job.task, "at_step"):  # what is asked of an example differs from step to step
        sequences = job.task.at_step(sequences, job.config.seed, step)
    n_targets = max(1, sum(len(s.targets) for s in sequences))  # of the whole step, before any backward
    n_tokens = sum(map(len, sequences))
    micros = job.micro_batches(sequences)

    # a step is two parts, one after the other or recorded as CUDA graphs and replayed: `accumulate`, `update`
    if job.config.graph and job.graphs is None:
        job.graphs = Graphs(job, accumulate, update)
    take_step = job.graphs.step if job.graphs else plain_step
    places = {s.number: i for i, s in enumerate(sequences)}
    loss, counted, norm, stop, losses = take_step(job, micros, step, n_targets, lr, places)
    if not math.isfinite(loss):
        numbers = ", ".join(str(s.number) for s in sequences)
        raise FloatingPointError(
            f"the loss of step {step + 1} is {loss}; its examples, counted from 0: {numbers}; "
            f"the last checkpoint: {runs.last_checkpoint(job.config) or 'none yet'}"
        )
    values = {
        "train/loss": loss / n_targets,
        f"train/{job.task.COUNTED}": counted / n_targets,
        "train/grad_norm": norm if math.isfinite(norm) else None,
        "train/learning_rate": lr,
        "train/tokens": n_tokens,
        "train/tokens_per_second": n_tokens / (time.perf_counter() - start),
        "train/peak_memory": peak_memory(),
    }
    if losses:
        values["losses"] = {s.number: losses[places[s.number]] for s in sequences if len(s.targets)}
    if job.scaler.is_enabled():
        values["train/loss_scale"] = job.scaler.get_scale()
    return values, stop


def plain_step(
    job: Job, micros: list[list[Sequence]], step: int, n_targets: int, lr: float, places: dict[int, int]
) -> tuple[float, float, float, int, list[float]]:
    """One update: (loss summed, what the task counts beside it, norm of the gradients, signal to stop by or 0, losses).

    places: of the step's examples, by their numbers; the losses, each the mean over an example's targets, are in them.

    All numbers stay on the device until the end, where they are read at once: each reading waits for a GPU.
    """
    sums = torch.zeros(4 + len(places), dtype=torch.float64, device=job.model.device)
    for micro in micros:
        batch = pack(micro).to(job.model.device)
        batch.losses = sums.new_full((batch.n_targets,), torch.nan, dtype=torch.float32)  # of a task that leaves none
        sums[:2] += accumulate(job, batch, Noise(job.config.seed, step, batch.keys), n_targets)
        mean_losses(batch.losses, micro, places, onto=sums[4:])

    # a signal that reached one process travels beside the sums, so that all stop after the same step
    sums[2] = signal.SIGINT in job.caught
    sums[3] = signal.SIGTERM in job.caught
    job.world.add_up(sums)

    for group in job.optimizer.param_groups:
        group["lr"] = lr * group["ratio"]
    norm = update(job, skip=(~sums[0].isfinite()).float())
    job.optimizer.zero_grad()
    loss, counted, interrupted, terminated, *losses, norm = torch.cat([sums, norm.double()[None]]).tolist()
    return loss, counted, norm, stop_signal(interrupted, terminated), losses


def accumulate(job: Job, batch: Batch, noise: Noise, n_targets: int | Tensor) -> Tensor:
    """Forward and backward of a micro-batch: adds to the gradients. (loss summed, what the task counts), (2,) float64.

    n_targets: of the whole step, which its loss is the mean over.
    """
    with sums_in_order(batch if job.in_order else None):
        with rematerialise():
            loss, counted = job.task.loss(job.model, batch, noise, job.config.label_smoothing)
        job.scaler.scale(loss / n_targets).backward()
    return torch.stack([loss.detach().double(), counted.double()])


def update(job: Job, skip: Tensor) -> Tensor:
    """Clips the gradients of all processes and updates the weights; returns the gradients' norm, ().

    skip: () float32, 1 where the loss is not finite: then no weight changes.
    """
    job.world.add_gradients(job.parameters)
    job.scaler.unscale_(job.optimizer)
    norm = clip(job.parameters, job.config.clip)
    job.scaler.step(job.optimizer, skip=skip)  # float16: not where a gradient overflowed, either
    job.scaler.update()
    return norm
