"""Every measurement, one script after the other, each in a fresh process: RESULTS.md and results.json, whole.

    python benchmarks/all.py --write benchmarks/RESULTS.md              within 90 minutes on two cores
    python benchmarks/all.py --only step,ladder                         these alone, and nothing is written
    python benchmarks/all.py --quick                                    the quick form of each: does it run?

SCRIPTS says what each is given to keep its minutes, which are those of two cores of AMD EPYC (Zen 4). By their own
defaults, or with more seeds, some take much longer: whole jobs of IMDB reviews (peers.py --data imdb, 45 minutes a
seed), three seeds for each accuracy (peers.py, methods.py, nano.py), all cases of step.py and its compiled peer, as
ladder.py has one. gpu.py runs where there is a CUDA device, and takes ten minutes more.

What the scripts print goes to standard error, with what is left; at the end stands what each took. A script that fails
does not stop the others; exit code 1 then.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import make_parser, parse, table, told

HERE = Path(__file__).parent
BUDGET = 90  # minutes of all, gpu.py excepted


@dataclass(frozen=True)
class Script:
    """A command: the script with what it needs, what keeps it short (not with --quick), and the minutes it has."""

    line: str
    options: str
    minutes: float


STEPS = "bert-full-imdb,bert-qlora-imdb,gpt2-qlora-webnlg,gpt2-full-text"
SCRIPTS = {
    "ops": Script("ops.py", "--seconds 1", 0.5),
    "ops-bf16": Script("ops.py --dtype bf16", "--seconds 1", 0.5),
    "invariance": Script("invariance.py", "", 2),
    "scaling": Script("scaling.py", "", 2.5),
    "ladder": Script("ladder.py", "--steps 4", 13),
    "step": Script("step.py", f"--steps 4 --cases {STEPS} --engines floor,minift,peer,loop", 15),
    "plans": Script("plans.py", "", 14),
    "peers-sst2": Script("peers.py --data sst2", "--seeds 42", 9),
    "peers-imdb": Script("peers.py --data imdb", "--seeds 42 --steps 8", 1),
    "methods": Script("methods.py", "--seeds 42 --engines lora,qlora,int8,peft-lora", 10),
    "quality": Script("quality.py --data webnlg", "--seeds 42", 1),
    "chars": Script("chars.py", "--rounds 1 --engines minift,muon,plain", 6),
    "labels": Script("labels.py", "", 4),
    "nano": Script("nano.py", "--seeds 1", 10),
    "gpu": Script("gpu.py", "", 10),
}


def has_cuda() -> bool:
    """Whether torch finds a CUDA device; asked in another process, for this one stays small."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def chosen(only: str) -> list[str]:
    """The names to run, in the order of SCRIPTS. Raises ValueError for one that is none."""
    names = only.split(",")
    if unknown := [name for name in names if name not in SCRIPTS]:
        raise ValueError(f"--only is {only!r}; expected some of {','.join(SCRIPTS)}, without {','.join(unknown)}")
    return [name for name in SCRIPTS if name in names]


def minutes_left(names: list[str], took: dict[str, float]) -> float:
    """What those of `names` that are not in `took` will take: their minutes, at the pace of those that are."""
    planned = sum(SCRIPTS[name].minutes for name in took)
    left = sum(SCRIPTS[name].minutes for name in names if name not in took)
    pace = sum(took.values()) / planned if planned else 1.0
    return left * pace


def run(name: str, a: argparse.Namespace) -> int:
    """Runs a script to its end; its exit code."""
    script = SCRIPTS[name]
    file, *words = script.line.split()
    words += ["--quick"] if a.quick else script.options.split()
    words += ["--write", str(a.write)] if a.write else []
    environment = os.environ | {"MINIFT_ASSETS": str(a.assets)}
    return subprocess.run([sys.executable, str(HERE / file), *words], stdout=sys.stderr, env=environment).returncode


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--only", default=",".join(SCRIPTS), help="some of %(default)s")
    a = parse(p)
    try:
        names = chosen(a.only)
    except ValueError as e:
        p.error(str(e))
    if "gpu" in names and not a.quick and not has_cuda():
        print("gpu: left out, torch finds no CUDA device", file=sys.stderr)
        names.remove("gpu")
    took: dict[str, float] = {}
    rows = []
    for number, name in enumerate(names, 1):
        gone, left = sum(took.values()), minutes_left(names, took)
        progress = f"[{number}/{len(names)}] {name}; {gone:.0f} minutes gone, about {left:.0f} left"
        print(progress, file=sys.stderr, flush=True)
        start = time.perf_counter()
        code = run(name, a)
        took[name] = (time.perf_counter() - start) / 60
        result = f"failed, exit code {code}" if code else "done"
        rows.append(told({"script": name, "minutes": SCRIPTS[name].minutes, "took": took[name], "result": result}))
    lines = [[r["script"], r["result"], f"{r['minutes']:g}", f"{r['took']:.1f}"] for r in rows]
    lines.append(["all", "", f"{sum(r['minutes'] for r in rows):g}", f"{sum(took.values()):.1f}"])
    print(table(["script", "", "minutes", "took"], lines, left=2))
    if failed := [r["script"] for r in rows if r["result"] != "done"]:
        sys.exit(f"failed: {', '.join(failed)}; again by --only {','.join(failed)}")


if __name__ == "__main__":
    main()
