"""The end of a run in a few lines: what was learned, how well, how fast, in how much memory, where it is, what next."""

import json
import math
import statistics
from pathlib import Path

import torch

from ..errors import printable
from ..models import Model
from ..tasks import task_of
from .track import peak_memory

FEW = 12  # labels that a line names


def summarize(
    model: Model, method: str, steps: int, seconds: float, folder: Path, best: dict, n_valid: int, next_command: str
) -> list[str]:
    """The lines. folder: the model to take away; best: its metrics, of n_valid examples that were held out, or empty.

    Speed and losses are read from the run's metrics.jsonl, which also has what came before a resume.
    """
    with open(folder.parent / "metrics.jsonl", encoding="utf-8") as file:
        history = [json.loads(line) for line in file]
    time = f"{steps:,} step{'s' if steps > 1 else ''} in {seconds:.1f} s"
    if history:
        speed = statistics.median(step["train/tokens_per_second"] for step in history)
        time += f", {speed:,.0f} tokens/s in the median step"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = "an adapter that PEFT loads" if model.adapter else "a model that transformers loads"
    rows = {
        "learned": f"{learned(model)} ({method}: {trained:,} of {model.size():,} parameters)",
        "quality": quality(model, best, n_valid, history),
        "time": time,
        "memory": memory(model),
        "model": f"{folder} ({kind})",
        "next": next_command,
    }
    return [printable(f"{name:<7}  {text}") for name, text in rows.items()]


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
    first, last = statistics.mean(losses[:few]), statistics.mean(losses[-few:])
    return f"training loss {first:.3f}, {last:.3f} at the end; none held out (see --valid)"


def memory(model: Model) -> str:
    """What was held at once, at most."""
    host = f"{peak_memory() / 1e6:,.0f} MB at the peak"
    if model.device.type != "cuda":
        return host
    return f"{torch.cuda.max_memory_allocated(model.device) / 1e6:,.0f} MB on the GPU, {host} beside it"
