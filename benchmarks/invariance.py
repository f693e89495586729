"""How far apart the curves of the same run are when it is split differently: micro-batches, processes, shards.

    python benchmarks/invariance.py [--write benchmarks/RESULTS.md]

12 steps of 8 examples at learning rate 1e-3, dropout 0.1, float32: a random BERT (2 layers, width 32) on 60 short
reviews, a random GPT-2 (2 layers, width 32, the real vocabulary) on 60 WebNLG completions of very unequal length.
Printed: the largest difference of any step's loss, and of any final weight but the keys' biases, from the undivided run
on one process.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    command,
    copy_tokenizer,
    launcher,
    make_parser,
    parse,
    read_rows,
    table,
    told,
    write_rows,
    write_section,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CASES = [(1, 64, []), (1, 512, []), (2, 0, []), (3, 0, []), (2, 64, []), (2, 0, ["--shard"]), (3, 64, ["--shard"])]
QUICK = [(1, 64, []), (2, 64, ["--shard"])]


def prepare(task: str, folder: Path, assets: Path) -> list[str]:
    """Writes model and data; returns the options that name them."""
    from helpers import peer, reviews, small_bert
    from transformers import GPT2LMHeadModel

    if task == "classify":
        small_bert(folder / "model")
        return ["--data", str(reviews(folder / "train.tsv", 60))]
    peer(GPT2LMHeadModel, folder / "model", scale=0.05, vocab_size=50257, n_positions=128)
    copy_tokenizer("gpt2", folder / "model", assets)
    return ["--data", str(write_rows(folder / "train.jsonl", read_rows(assets, "webnlg")[:60]))]


def run(options: list[str], out: Path, processes: int) -> tuple[list[float], dict]:
    """Losses and final weights."""
    from safetensors.torch import load_file

    line = [*launcher(processes), "-m", "minift", "train", *options, "--out", str(out)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    losses = [json.loads(line)["train/loss"] for line in open(out / "metrics.jsonl")]
    weights = load_file(out / "last/model.safetensors")
    return losses, {k: v for k, v in weights.items() if not k.endswith(("key.bias", "c_attn.bias"))}


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--tasks", default="classify,complete")
    p.add_argument("--steps", type=int, default=12, help="(default %(default)s)")
    a = parse(p, tasks="classify", steps=3)
    cases = QUICK if a.quick else CASES
    rows = []
    for task in a.tasks.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            fixed = ["--task", task, "--model", str(folder / "model"), "--steps", str(a.steps)]
            fixed += ["--lr", "1e-3", "--precision", "fp32"]
            options = fixed + prepare(task, folder, a.assets)
            losses, weights = run(options, folder / "one", 1)
            for n, tokens, more in cases:
                found, theirs = run([*options, "--tokens", str(tokens), *more], folder / f"{n}-{tokens}{more}", n)
                loss = max(abs(x - y) for x, y in zip(losses, found, strict=True))
                weight = max((weights[k] - theirs[k]).abs().max().item() for k in weights)
                case = {"task": task, "processes": n, "tokens": tokens or "all", "options": " ".join(more)}
                rows.append(told(case | {"loss": loss, "weights": weight}))
    lines = [[str(value) if type(value) is not float else f"{value:.1e}" for value in row.values()] for row in rows]
    found = table(["task", "processes", "--tokens", "", "loss", "weights"], lines)
    print(found)
    if a.write:
        write_section(a.write, "invariance", "How far splits of a run differ", command(p, a), rows, found)


if __name__ == "__main__":
    main()
