"""What a training step costs as one thing grows and all else stays: seconds, memory, and the exponent of each.

    python benchmarks/scaling.py [--axes tokens,length,width,depth,rank,processes]

A BERT of random weights and a classifier, float32, dropout 0.1, all weights learn; the steps are minift.train_step's.
Every axis goes through the same middle (BASE), in which a step is 16 sequences of 128 random tokens:

tokens      of a step: more sequences, of the same length
length      of a sequence: fewer of them, so that the tokens of a step stay the same
width       C; heads stay 64 wide, the feed-forward part 4 C
depth       layers, of which the last one computes only what is asked about: cost goes with depth - 1, and e is above 1
rank        of LoRA on query and value; here the other weights are frozen
processes   that share a step, one thread each, as torchrun starts them; one machine

A power law, cost = a x^e, is fitted by least squares in the logarithms, over the whole range of the axis. "off" is the
largest factor by which a point lies away from it: where that is large the cost is no power of x in this range, and e
only a mean slope. Products alone would have e = 1 for tokens and depth, 2 for width and -1 for processes; for length
and rank, what is not 0 is attention's and the adapter's share.

Every point is a fresh process. Seconds are the median step without the first two; memory is the process's peak (of
several, the first one's), less what it was after a step of a tiny model.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import (
    SEED,
    command,
    fresh,
    make_parser,
    parse,
    peak_mb,
    seconds,
    table,
    told,
    write_section,
)

BASE = dict(tokens=2048, length=128, width=256, depth=4, rank=0, processes=1)  # rank 0: all weights learn
AXES = {
    "tokens": [512, 1024, 2048, 4096, 8192],
    "length": [32, 64, 128, 256, 512, 1024, 2048],
    "width": [128, 256, 512, 1024],
    "depth": [2, 4, 8, 16],
    "rank": [4, 16, 64, 256],
    "processes": [n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)],
}
QUICK = dict(tokens=256, length=32, width=64, depth=2)
QUICK_AXES = {
    "tokens": [256, 512],
    "length": [32, 64],
    "width": [64, 128],
    "depth": [2, 4],
    "rank": [4, 8],
    "processes": [1, 2],
}
TINY = dict(tokens=64, length=32, width=64, depth=1)
VOCABULARY = 1000  # small, so that the embedding does not hide the layers
COSTS = ("step_s", "grown_mb")
HEAD = ["axis", "x", "s a step", "tokens/s", "MB"]
FITS = ["axis", "points", "from", "to", "seconds: e", "off", "MB: e", "off"]


def make_sequences(case: dict, step: int) -> list:
    """The sequences of a step, of random tokens, asked about at their first one."""
    from minift.data.batch import Sequence

    rng = np.random.default_rng([SEED, step])
    count = case["tokens"] // case["length"]
    found = []
    for i in range(count):
        ids = rng.integers(5, VOCABULARY, case["length"], dtype=np.int32)
        found.append(Sequence(step * count + i, ids, None, np.zeros(1, np.int32), np.array([i % 2])))
    return found


def make_job(case: dict):
    """What steps of a case run on: minift's Job, of a model whose weights are drawn."""
    import minift
    from minift.models import family_named

    positions = max(case["length"], *AXES["length"])
    sizes = family_named("bert").sized(VOCABULARY, case["width"], case["depth"], case["width"] // 64, positions)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "bert"} | sizes))
        model, _ = minift.load(folder, task="classify", labels=["0", "1"], init="random")
    if case["rank"]:
        minift.add_lora(model, rank=case["rank"])
    # a step is one micro-batch on every axis
    return minift.prepare(model, device="cpu", precision="fp32", tokens=case["tokens"], max_length=case["length"])


def measure(case: dict, steps: int) -> dict:
    """One point, in this process; empty where it is not the first of several."""
    import torch

    from minift import train_step
    from minift.engine.distributed import leave

    # libraries and their threads take memory at the first step, of any model: it is not what grows
    tiny = case | TINY | {"rank": min(case["rank"], TINY["width"])}
    train_step(make_job(tiny), make_sequences(tiny, 0), 0, 1e-5)
    before = peak_mb()
    job = make_job(case)
    times = []
    for step in range(steps):
        sequences = make_sequences(case, step)
        times.append(seconds(lambda step=step, given=sequences: train_step(job, given, step, 1e-5)))
    is_first = job.world.first
    leave()
    if not is_first:
        return {}
    step_s = statistics.median(times[2:])
    figures = {"step_s": step_s, "tokens_s": case["tokens"] / step_s, "grown_mb": peak_mb() - before}
    return figures | {"threads": torch.get_num_threads()}


def power_law(x: list[float], y: list[float]) -> tuple[float, float]:
    """(the exponent e of y = a x^e by least squares in logarithms, the largest factor that a point is off by)."""
    logs = np.log(x), np.log(y)
    e, intercept = np.polyfit(*logs, 1)
    residuals = logs[1] - e * logs[0] - intercept
    return float(e), math.exp(np.abs(residuals).max())


def run_all(a: argparse.Namespace) -> list[dict]:
    """The points of all axes, each measured by processes of their own; the middle, which several axes share, once."""
    base, axes = (BASE | QUICK, QUICK_AXES) if a.quick else (BASE, AXES)
    rows, done = [], {}
    for axis in a.axes.split(","):
        for x in axes[axis]:
            case = base | {axis: x}
            # processes are compared with one another at one thread each, a single one too
            threads = 1 if axis == "processes" else 0
            key = (threads, *case.values())
            if key not in done:
                environment = os.environ | ({"OMP_NUM_THREADS": "1"} if threads else {})
                done[key] = fresh(case, case["processes"], env=environment)
            rows.append(told({"axis": axis, "x": x} | done[key]))
    return rows


def fit_all(rows: list[dict]) -> list[dict]:
    """The exponents of each axis that has two points or more."""
    found = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        points = [row for row in rows if row["axis"] == axis]
        x = [row["x"] for row in points]
        if len(x) < 2:
            print(f"{axis}: one point, and no exponent; expected a machine with more cores", file=sys.stderr)
            continue
        fit = {"axis": axis, "points": len(x), "from": min(x), "to": max(x)}
        for cost in COSTS:
            fit[f"{cost}_exponent"], fit[f"{cost}_off"] = power_law(x, [row[cost] for row in points])
        found.append(told(fit))
    return found


def main() -> None:
    p = make_parser(__doc__, needs_assets=False)
    p.add_argument("--axes", default=",".join(AXES), help="(default %(default)s)")
    p.add_argument("--steps", type=int, default=9, help="at least 3 (default %(default)s)")
    a = parse(p, steps=4)
    if a.here:
        if found := measure(a.here, a.steps):
            print(json.dumps(found))
        return
    rows = run_all(a)
    lines, fits = [], fit_all(rows)
    for fit in fits:
        counts = [fit["axis"], *(f"{fit[key]:,}" for key in ("points", "from", "to"))]
        lines.append(counts + [f"{fit[f'{cost}_{what}']:.2f}" for cost in COSTS for what in ("exponent", "off")])
    points = [
        [row["axis"], f"{row['x']:,}", f"{row['step_s']:.4f}", f"{row['tokens_s']:,.0f}", f"{row['grown_mb']:,.0f}"]
        for row in rows
    ]
    found = f"{table(FITS, lines)}\n\n{table(HEAD, points)}"
    print(found)
    if a.write:
        text = f"""float32, dropout 0.1, a BERT of random weights: {BASE} where
nothing else is said (rank 0: all weights learn); MB above the process with a tiny model; cost = a x^e, and "off" the
largest factor between a point and that.

{found}"""
        title = "How cost grows: tokens, length, width, depth, rank, processes"
        write_section(a.write, "scaling", title, command(p, a), rows + fits, text)


if __name__ == "__main__":
    main()
