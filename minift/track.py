"""What a run tells: metrics.jsonl and results.csv for programs, a progress bar or plain lines for people.

Standard error carries progress, standard output results.
"""

import csv
import json
import resource
import sys
import time
from pathlib import Path

from tqdm import tqdm

RESULTS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
EVERY = 10.0  # seconds between two plain lines where standard error is no terminal


def say(message: str) -> None:
    """One message on standard error, above a progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


class Progress:
    """A bar on a terminal; elsewhere a plain line now and then, and at the end."""

    def __init__(self, total: int, unit: str):
        shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s, {remaining} left{postfix}"  # fits 60 columns
        self.bar = tqdm(
            total=total,
            unit=unit,
            bar_format=shape,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.total, self.unit, self.done = total, unit, 0
        self.start = self.told = time.monotonic()

    def add(self, n: int = 1, note: str = "") -> None:
        """n more done."""
        self.done += n
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(n)
        now = time.monotonic()
        if self.bar.disable and (now - self.told >= EVERY or self.done >= self.total):
            left = (now - self.start) / self.done * (self.total - self.done)
            say(f"{self.unit} {self.done}/{self.total}  {note}  {tqdm.format_interval(left)} left")
            self.told = now

    def close(self) -> None:
        """Leaves the bar on the screen."""
        self.bar.close()


class Tracker:
    """Writes the files of a run folder, a line at a time, flushed at once: what is written survives a crash."""

    def __init__(self, out: Path, steps: int):
        self.jsonl = open(out / "metrics.jsonl", "a", encoding="utf-8", buffering=1)
        self.file = open(out / "results.csv", "a", encoding="utf-8", newline="", buffering=1)
        self.csv = csv.DictWriter(self.file, RESULTS)
        self.csv.writeheader()
        self.progress, self.smooth = Progress(steps, "step"), None

    def step(self, values: dict, evaluated: dict | None = None) -> None:
        """One optimizer step: `values` by their names in metrics.jsonl, and the validation after it, if any."""
        loss = values["train/loss"]
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss
        self.jsonl.write(json.dumps(values | {f"eval/{k}": v for k, v in (evaluated or {}).items()}) + "\n")
        row = {"step": values["train/global_step"], "train_loss": loss, "train_accuracy": values["train/accuracy"]}
        if evaluated:
            row |= {"valid_loss": evaluated["loss"], "valid_mean_token_accuracy": evaluated["accuracy"]}
        self.csv.writerow(row)
        self.progress.add(1, f"loss {self.smooth:.3f}  {values['train/tokens_per_second']:,.0f} tok/s")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_) -> None:
        self.progress.close()
        self.jsonl.close()
        self.file.close()
