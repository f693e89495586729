"""What `minift plan` says of a run, beside what the run takes: memory and seconds a step.

    python benchmarks/plans.py [--families bert,gpt2] [--methods full,lora,qlora] [--lengths 32,128,300]

BERT-base (a class for each text) and GPT-2 (prompts and completions) of random weights, a step of 8 sequences, all of
one length; full, lora (r=8) and qlora (lora over a base in NF4). Each case is planned by one process and run by
another, `minift train --steps 5`. Memory is the peak of that process, seconds are its median step without the first;
with --rounds the largest peak, and medians of all plans and steps.

--limit 5: the run may take no more than 5 % above its forecast, as a control group of Linux sees to, which kills it
where it does. Without the right to make one, runs are not limited, and the table says so.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common import command, make_parser, parse, random_model, table, told, write_rows, write_section

BATCH = 8
OPTIONS = {
    "full": ["--method", "full"],
    "lora": ["--method", "lora"],
    "qlora": ["--method", "lora", "--base", "nf4"],
}
TASKS = {"bert": "classify", "gpt2": "complete"}
HEAD = ["family", "method", "tokens", "precision", "MB", "plan", "off", "s a step", "plan", "off", "in its limit"]


def make_data(family: str, length: int, path: Path) -> Path:
    """Examples of `length` tokens each: "film" is one, in both vocabularies, and one or two are the model's own."""
    if family == "bert":
        rows = [{"text": "film " * (length - 2), "label": i % 2} for i in range(4 * BATCH)]
    else:
        asked = length // 2
        row = {"prompt": "film " * (length - asked), "completion": " film" * (asked - 1)}
        rows = [row] * (4 * BATCH)
    return write_rows(path, rows)


def minift(words: list[str], **options) -> subprocess.CompletedProcess:
    """`minift WORDS`, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "minift", *words], capture_output=True, text=True, **options)


@contextmanager
def control_group() -> Iterator[Path | None]:
    """The folder of a control group whose memory can be limited, or None where none can be made."""
    # of the second version, and of the first
    for parent, name in (
        (Path("/sys/fs/cgroup"), "memory.max"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    ):
        group = parent / f"minift-plans-{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            if (group / name).exists():
                yield group / name
                group.rmdir()
                return
            group.rmdir()
    yield None


def joining(group: Path | None, limit: int) -> Callable[[], None] | None:
    """What a process does when it begins, so that it can take no more than `limit` bytes."""
    if group is None:
        return None
    group.write_text(str(limit))

    def join() -> None:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))

    return join


def run_case(row: dict, a: argparse.Namespace, work: Path, group: Path | None) -> dict:
    """The row with what was planned and what was measured."""
    family, length = row["family"], row["tokens"]
    data = make_data(family, length, work / f"{family}-{length}.jsonl")
    words = ["--model", str(work / family), "--data", str(data), "--task", TASKS[family], "--batch", str(BATCH)]
    words += ["--steps", str(a.steps), "--precision", row["precision"], *OPTIONS[row["method"]]]
    plans: list[dict] = []
    peaks: list[float] = []
    times: list[float] = []
    for i in range(a.rounds):  # in turns, so that a busy machine slows both alike
        planned = minift(["plan", *words, "--json"], check=True)
        plans.append(json.loads(planned.stdout.splitlines()[-1]))
        limit = round(plans[-1]["memory"] * (1 + a.limit / 100))
        out = work / f"run-{'-'.join(str(value) for value in (*row.values(), i))}"
        done = minift(["train", *words, "--out", str(out)], preexec_fn=joining(group, limit))
        if done.returncode == -signal.SIGKILL and group is not None:
            return row | medians(plans) | {"within": "killed"}
        if done.returncode:
            raise RuntimeError(f"minift {' '.join(words)}: {done.stderr}")
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(out)
        peaks.append(steps[-1]["train/peak_memory"] / 1e6)
        times += [step["train/tokens"] / step["train/tokens_per_second"] for step in steps[1:]]
    within = "not limited" if group is None else "yes"
    return row | medians(plans) | {"within": within, "mb": max(peaks), "s": statistics.median(times)}


def medians(plans: list[dict]) -> dict:
    """What was planned."""
    return {
        "planned_mb": statistics.median(plan["memory"] for plan in plans) / 1e6,
        "planned_s": statistics.median(plan["seconds"] for plan in plans),
    }


def run_all(a: argparse.Namespace, work: Path) -> list[dict]:
    """All cases, one after the other."""
    found = []
    with control_group() as group:
        for family in a.families.split(","):
            random_model(family, work / family, a.assets, small=a.quick)
            for method in a.methods.split(","):
                for length in map(int, a.lengths.split(",")):
                    for precision in a.precisions.split(","):
                        row = {"family": family, "method": method, "tokens": length, "precision": precision}
                        found.append(told(run_case(row, a, work, group if a.limit else None)))
    return found


def figures(row: dict) -> list[str]:
    """A line of the table; dashes where the run was killed."""
    found = [row["family"], row["method"], str(BATCH * row["tokens"]), row["precision"]]
    for measured, planned, form in (("mb", "planned_mb", ",.0f"), ("s", "planned_s", ".3f")):
        if measured in row:
            off = f"{row[planned] / row[measured] - 1:+.1%}"
            found += [format(row[measured], form), format(row[planned], form), off]
        else:
            found += ["-", format(row[planned], form), "-"]
    return [*found, row["within"]]


def worst(rows: list[dict]) -> str:
    """How far off memory and seconds are at most, and in how many cases they are near."""
    ran = [row for row in rows if "mb" in row]
    memory = [abs(row["planned_mb"] / row["mb"] - 1) for row in ran]
    seconds = [abs(row["planned_s"] / row["s"] - 1) for row in ran]
    within = sum(row["within"] == "yes" for row in rows)
    parts = [
        f"Of {len(rows)} cases, memory is within 5 % in {sum(off <= 0.05 for off in memory)}",
        f"(at most {max(memory, default=0):.1%} off) and seconds within 10 % in {sum(off <= 0.1 for off in seconds)}",
        f"(at most {max(seconds, default=0):.1%}); {within} ended within their limit.",
    ]
    return " ".join(parts)


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--families", default="bert,gpt2", help="(default %(default)s)")
    p.add_argument("--methods", default="full,lora,qlora", help="(default %(default)s)")
    p.add_argument("--lengths", default="32,128,300", help="tokens of a sequence (default %(default)s)")
    p.add_argument("--precisions", default="fp32,bf16", help="(default %(default)s)")
    p.add_argument("--steps", type=int, default=5, help="at least 2 (default %(default)s)")
    p.add_argument("--rounds", type=int, default=1, help="plans and runs of each case, in turns (default %(default)s)")
    p.add_argument("--limit", type=float, default=5, help="percent above the forecast; 0: none (default %(default)s)")
    a = parse(p, families="bert", methods="lora", lengths="16", precisions="fp32", steps=2, limit=40)
    with tempfile.TemporaryDirectory() as work:
        rows = run_all(a, Path(work))
    found = f"{table(HEAD, [figures(row) for row in rows], left=2)}\n\n{worst(rows)}"
    print(found)
    if a.write:
        title = "What a plan says, beside what the run takes"
        write_section(a.write, "plans", title, command(p, a), rows, found)


if __name__ == "__main__":
    main()
