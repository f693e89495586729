"""The end of a run in a few lines: what was learned, how well, how fast, in how much memory, where it is, what next."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import printable
from ..models import Model
from ..tasks import task_of

FEW = 12  # labels that a line names


@dataclass
class Run:
    """What a finished run leaves: its folder, and what was measured at its end."""

    out: Path
    steps: int
    seconds: float
    model: Path  # the folder to take away: best/ where there was a validation, else last/
    metrics: dict  # of the best validation, or empty
    details: dict  # what else the task has to tell of it: of classify the figures of each label


def summarize(
    run: Run, model: Model, method: str, n_valid: int, peak: int, forecast: dict | None, next_command: str
) -> list[str]:
    """The lines of a run that ended with `model`. n_valid: examples that were held out.

    peak: bytes of the process, at most; forecast: memory and seconds a step as planned, or None. Speed and losses are
    read from the run's metrics.jsonl, which also has what came before a resume.
    """
    history = read_history(run.out)
    time = f"{run.steps:,} step{'s' if run.steps > 1 else ''} in {run.seconds:.1f} s"
    if history:
        speed = statistics.median(step["train/tokens_per_second"] for step in history)
        time += f", {speed:,.0f} tokens/s in the median step"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = "an adapter that PEFT loads" if model.adapter else "a model that transformers loads"
    rows = {
        "learned": f"{learned(model)} ({method}: {trained:,} of {model.size():,} parameters)",
        "quality": quality(model, run.metrics, n_valid, history),
        "time": time,
        "memory": memory(model, peak),
    }
    if forecast and history:
        rows["forecast"] = beside(forecast, measured(run.out, model.device))
    rows |= {"model": f"{run.model} ({kind})", "next": next_command}
    return [printable(f"{name:<8}  {text}") for name, text in rows.items()]


def read_history(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def measured(run: Path, device: torch.device) -> dict:
    """What the steps of a run took: bytes at the peak, of a GPU where there is one, and seconds of the median step.

    The first step does not count, where there are others: it also makes what later ones find.
    """
    history = read_history(run)
    peak = history[-1]["train/peak_memory"]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    seconds = [step["train/tokens"] / step["train/tokens_per_second"] for step in history]
    return {"memory": peak, "seconds": statistics.median(seconds[1:] or seconds)}


def beside(forecast: dict, found: dict) -> str:
    """A forecast and what was measured, in words."""
    seconds = max(found["seconds"], 1e-9)
    more = forecast["memory"] / found["memory"] - 1
    slower = forecast["seconds"] / seconds - 1
    return (
        f"{forecast['memory'] / 1e6:,.0f} MB, {forecast['seconds']:.3g} s a step; "
        f"it took {found['memory'] / 1e6:,.0f} MB ({more:+.0%}), {seconds:.3g} s ({slower:+.0%})"
    )


def learned(model: Model) -> str:
    """The task, and its labels where there are any."""
    if not model.labels:
        return str(model.task)
    if len(model.labels) > FEW:
        return f"{model.task} with {len(model.labels)} labels"
    return f"{model.task}: {', '.join(model.labels)}"


def quality(model: Model, best: dict, n_valid: int, history: list[dict]) -> str:
    """The task's own measure of the best validation, or how the training loss went where nothing was held out."""
    if best:
        name, _ = task_of(model).Metrics.best
        text = f"{name} {best[name]:.4f} on {n_valid:,} examples held out"
        steps = [step["train/global_step"] for step in history if step.get("eval/loss") == best["loss"]]
        return f"{text}, the best, after step {steps[0]:,}" if steps else text
    losses = [step["train/loss"] for step in history] or [math.nan]
    few = max(1, min(10, len(losses) // 2))  # a mean of some, for the loss of a single step is noise
    first = statistics.mean(losses[:few])
    last = statistics.mean(losses[-few:])
    return f"training loss {first:.3f}, {last:.3f} at the end; none held out (see --valid)"


def memory(model: Model, peak: int) -> str:
    """What was held at once, at most. peak: bytes of the process."""
    host = f"{peak / 1e6:,.0f} MB at the peak"
    if model.device.type != "cuda":
        return host
    return f"{torch.cuda.max_memory_allocated(model.device) / 1e6:,.0f} MB on the GPU, {host} beside it"
