"""What a run tells: metrics.jsonl and results.csv for programs, a progress bar or plain lines for people.

Standard error carries progress, standard output results.
"""

import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from ..config import TrainConfig
from ..errors import InputError, printable
from ..files import naming, write_text

EVERY = 10.0  # seconds between two plain lines where standard error is no terminal


def speaks() -> bool:
    """Whether this process talks to people: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """One message on standard error, above a progress bar if there is one."""
    if speaks():
        tqdm.write("\n".join(map(printable, message.split("\n"))), file=sys.stderr)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    with suppress(OSError, StopIteration):  # not getrusage's, which begins at that of the process that started this one
        status = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> tuple[int, int]:
    """Bytes of this process that are in memory now: (its own, those of files, such as libraries); 0 where unknown."""
    try:
        _, pages, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    except (OSError, ValueError):
        return 0, 0
    return (pages - shared) * resource.getpagesize(), shared * resource.getpagesize()


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then, and at the end."""

    def __init__(self, total: int, unit: str, done: int = 0):
        shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}"  # fits 60 columns
        self.bar = tqdm(total=total, unit=unit, bar_format=shape, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.total, self.unit, self.done, self.first = total, unit, done, done
        self.start = self.told = time.monotonic()

    def add(self, n: int = 1, note: str = "") -> None:
        """n more done; where they are more than there seemed to be, as of a text that is cut, all of them are meant."""
        self.done += n
        is_last = self.done - n < self.total <= self.done
        self.total = self.bar.total = max(self.total, self.done)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(n)
        now = time.monotonic()
        is_time = now - self.told >= EVERY and self.done > self.first
        if self.bar.disable and self.total > 1 and (is_time or is_last):
            left = (now - self.start) / (self.done - self.first) * max(0, self.total - self.done)
            words = (f"{self.unit} {self.done}/{self.total}", note, f"{tqdm.format_interval(left)} left")
            say("  ".join(filter(None, words)))
            self.told = now

    def close(self) -> None:
        """Leaves the bar on the screen."""
        self.bar.close()


def result_columns(task: ModuleType) -> dict[str, str]:
    """The columns of results.csv after the step: its name there -> the metric. task: a file of tasks/.

    They are those of OpenAI's fine-tuning service, whose accuracy has a name of its own.
    """
    counted = task.COUNTED
    valid = "mean_token_accuracy" if counted == "accuracy" else counted
    columns = {
        "train_loss": "train/loss",
        f"train_{counted}": f"train/{counted}",
        "valid_loss": "eval/loss",
        f"valid_{valid}": f"eval/{counted}",
    }
    best, _ = task.Metrics.best
    if best not in ("loss", counted):
        columns[f"valid_{best}"] = f"eval/{best}"
    return columns


class Tracker:
    """Writes the files of a run folder, a line a step, flushed at once: what is written survives a crash.

    columns: of results.csv. done: the steps of a resumed run, seen: the examples in them; what was written of later
    ones, lost with them, is removed. active: whether this process is the one that writes. loggers: what else hears of
    each step.
    """

    def __init__(
        self, out: Path, steps: int, columns: dict[str, str], done: int, seen: int, active: bool, loggers: Sequence
    ):
        self.active = active
        self.columns = columns
        self.loggers = loggers
        self.smooth: float | None = None  # the loss, averaged over some steps
        if not active:
            return
        self.paths = out / "metrics.jsonl", out / "results.csv", out / "examples.jsonl"
        for path, lines in zip(self.paths, (done, done + 1, seen), strict=True):
            found = keep_lines(path, lines)
            if done and found < lines:
                say(f"{path}: has {found} of the {lines} lines of the steps before; it goes on with what comes now")
        self.jsonl = open(self.paths[0], "a", encoding="utf-8", buffering=1)
        self.file = open(self.paths[1], "a", encoding="utf-8", newline="", buffering=1)
        self.losses = open(self.paths[2], "a", encoding="utf-8", buffering=1)
        self.csv = csv.DictWriter(self.file, ["step", *columns])
        if self.file.tell() == 0:
            self.csv.writeheader()
        self.progress = Progress(steps, "step", done)

    def step(self, values: dict, evaluated: dict | None = None) -> None:
        """One optimizer step: `values` by their names in metrics.jsonl, and the validation after it, if any."""
        if not self.active:
            return
        loss = values["train/loss"]
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        values = values | {f"eval/{k}": v for k, v in (evaluated or {}).items()}
        row = {"step": values["train/global_step"]}
        row |= {column: values[name] for column, name in self.columns.items() if name in values}

        # JSON has no NaN and no infinity: null stands for them
        values = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        with naming(self.paths[0]):
            self.jsonl.write(json.dumps(values, allow_nan=False) + "\n")
        for logger in self.loggers:
            logger.log({k: v for k, v in values.items() if v is not None}, values["train/global_step"])
        with naming(self.paths[1]):
            self.csv.writerow(row)
        self.progress.add(1, f"loss {self.smooth:.3f}  {values['train/tokens_per_second']:,.0f} tok/s")

    def examples(self, epoch: int, losses: dict[int, float]) -> None:
        """The loss that each example of a step had in it, by the example's number; NaN where the task does not say."""
        if not self.active:
            return
        rows = ({"epoch": epoch, "example": n, "loss": loss} for n, loss in losses.items() if math.isfinite(loss))
        with naming(self.paths[2]):
            self.losses.writelines(json.dumps(row) + "\n" for row in rows)

    def finish(self, model: Path) -> None:
        """Hands over the finished model's folder."""
        for logger in self.loggers:
            logger.finish(model)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        if self.active:
            self.progress.close()
            self.jsonl.close()
            self.file.close()
            self.losses.close()


class TensorBoard:
    """Curves and options for TensorBoard, in the run folder's tensorboard/."""

    def __init__(self, out: Path, options: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"))
        self.writer.add_text("options", "\n".join(f"    {name}: {value}" for name, value in options.items()))

    def log(self, values: dict, step: int) -> None:
        """One point on every curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, model: Path) -> None:
        """Says where the model is."""
        self.writer.add_text("model", str(model))
        self.writer.close()


class WandB:
    """Curves, options, the machine's memory, and at the end the model as an artifact, for Weights & Biases.

    Its own environment variables hold: WANDB_MODE=offline, WANDB_PROJECT, WANDB_NAME...
    """

    def __init__(self, out: Path, options: dict):
        import wandb

        self.wandb = wandb
        project = os.environ.get("WANDB_PROJECT", "minift")
        self.run = wandb.init(project=project, dir=str(out), config=options, id=wandb_id(out, options), resume="allow")

    def log(self, values: dict, step: int) -> None:
        """One point on every curve."""
        self.run.log(values, step=step)

    def finish(self, model: Path) -> None:
        """Uploads the model's folder."""
        artifact = self.wandb.Artifact(f"model-{self.run.id}", type="model")
        artifact.add_dir(str(model))
        self.run.log_artifact(artifact)
        self.run.finish()


def wandb_id(out: Path, options: dict) -> str:
    """What the run in `out` is called at Weights & Biases: a resumed run is the same run, one begun anew another."""
    path = out / "wandb-id"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    if options["resume"]:  # a run that an older minift began
        return hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
    name = secrets.token_hex(8)
    write_text(path, name + "\n")
    return name


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}  # by the name of the library


def check_loggers(names: str) -> None:
    """Raises InputError where a library of `--log`, a comma list, is not installed."""
    for name in filter(None, names.split(",")):
        if importlib.util.find_spec(name) is None:
            raise InputError(f'--log {name}: {name} is not installed; `pip install "minift[{name}]"` installs it')


def make_loggers(config: TrainConfig, out: Path) -> list:
    """The loggers of `--log`. Raises InputError where a library does not load."""
    loggers = []
    for name in filter(None, config.log.split(",")):
        try:
            loggers.append(LOGGERS[name](out, dataclasses.asdict(config)))
        except ImportError as e:
            raise InputError(f'--log {name}: {e}; `pip install "minift[{name}]"` installs it') from e
    return loggers


def keep_lines(path: Path, n: int) -> int:
    """Cuts a file down to its first n lines; returns how many it has then, 0 where there is none."""
    if not path.exists():
        return 0
    with open(path, "r+b") as f:
        kept = sum(1 for _ in range(n) if f.readline())
        f.truncate(f.tell())
    return kept


def stop_signal(interrupted: float, terminated: float) -> int:
    """The signal to stop by, of which processes had caught SIGINT and SIGTERM; 0: none."""
    if terminated:
        return signal.SIGTERM
    return signal.SIGINT if interrupted else 0


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are put in the list, for the loop to look at; a second SIGINT is a KeyboardInterrupt.

    Only in the main thread: Python delivers signals nowhere else.
    """
    caught: list[int] = []

    def note(number: int, _) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
