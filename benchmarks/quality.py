"""Whether a run learns as much with a base in few bits, or in bfloat16: its loss and accuracy beside float32's.

    python benchmarks/quality.py --data rte --engines float32,int8 --seeds 42,43,44

LoRA (r=8, alpha=32, dropout 0.1) on query and value, imdb in full; linear schedule; what is held out is evaluated at
the end.

sst2: MiniLM (6 layers, width 384), SST-2's sentences, 2 epochs, batch 32, lr 5e-4; its test set.
rte: MiniLM, RTE's pairs of sentences, 3 epochs, batch 16, lr 5e-4; its dev set.
imdb: MiniLM, the tutorial's recipe: 2,000 reviews, 3 epochs, batch 8, lr 5e-5; 500 of its test set.
webnlg: the built-in gpt2-nano, 4,000 lines of WebNLG, one epoch, batch 16, lr 1e-3; 500 lines of its dev set.

Engines take turns (seed by seed), each case in a process of its own. Runs of other seeds differ by as much as the
column `spread` says: the largest of a figure less the smallest.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from common import command, draw, parse, peak_mb, read_rows, table, write_rows, write_section
from peers import run_all, seeds_parser

OPTIONS = {
    "float32": dict(precision="fp32"),
    "bf16": dict(precision="bf16"),
    "int8": dict(precision="fp32", base="int8"),
    "int8-bf16": dict(precision="bf16", base="int8"),
    "nf4": dict(precision="fp32", base="nf4"),
}
MINILM = "weights/all-MiniLM-L6-v2"
CASES = {
    "sst2": dict(model=MINILM, task="classify", epochs=2, batch=32, lr=5e-4, max_length=128),
    "rte": dict(model=MINILM, task="classify", epochs=3, batch=16, lr=5e-4, max_length=256),
    "imdb": dict(model=MINILM, task="classify", method="full", epochs=3, batch=8, lr=5e-5, max_length=512),
    "webnlg": dict(model="builtin:gpt2-nano", task="complete", epochs=1, batch=16, lr=1e-3, max_length=256),
}
HELD_OUT = {"sst2": "test", "rte": "dev", "imdb": "test", "webnlg": "dev"}
LINES = {"imdb": (2000, 500), "webnlg": (4000, 500)}  # to train on, to hold out; of the others all
QUICK = 32  # lines, for one epoch


def train_and_test(data: str, a: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The rows to train on and those held out."""
    train, test = read_rows(a.assets, data), read_rows(a.assets, data, HELD_OUT[data])
    n_train, n_test = LINES.get(data, (len(train), len(test)))
    if a.quick:
        n_train = n_test = QUICK
    return draw(train, n_train), draw(test, n_test)


def run(data: str, a: argparse.Namespace, engine: str, seed: int) -> dict:
    """One run: loss and accuracy of what was held out, the mean loss of its steps, and what it took."""
    import minift
    from minift.setup import load_model

    case = {"method": "lora"} | CASES[data]
    if case["model"] == MINILM:
        case["model"] = str(a.assets / MINILM)
    if a.quick:
        case["epochs"] = 1
    train, test = train_and_test(data, a)
    with tempfile.TemporaryDirectory() as temporary:
        config = minift.TrainConfig(
            data=str(write_rows(Path(temporary, "train.jsonl"), train)),
            out=str(Path(temporary, "run")),
            steps=a.steps,
            seed=seed,
            **case | OPTIONS[engine],
        )
        held_out = minift.EvalConfig(data=str(write_rows(Path(temporary, "held-out.jsonl"), test)))
        labels = sorted({row["label"] for row in train}) if case["task"] == "classify" else None
        model, tokenizer = load_model(config, labels and [*map(str, labels)])
        done = minift.train(model, tokenizer, config)
        found = minift.evaluate(model, tokenizer, held_out)
        losses = [json.loads(line)["train/loss"] for line in open(done.out / "metrics.jsonl")]
    return {
        "loss": found["loss"],
        "accuracy": found.get("accuracy", found.get("mean_token_accuracy")),
        "train_loss": statistics.mean(losses),
        "train_s": done.seconds,
        "peak_mb": peak_mb(),
    }


def losses_and_accuracies(rows: list[dict]) -> str:
    """A row per engine: its figures for each seed, their mean, their spread, and how far the mean is from float32's."""
    lines = []
    for name in ("loss", "accuracy", "train_loss"):
        base = [r[name] for r in rows if r["engine"] == rows[0]["engine"]]
        for engine in dict.fromkeys(r["engine"] for r in rows):
            mine = [r[name] for r in rows if r["engine"] == engine]
            mean = statistics.mean(mine)
            away = f"{mean - statistics.mean(base):+.4f}" if engine != rows[0]["engine"] else ""
            figures = " ".join(f"{value:.4f}" for value in mine)
            lines.append([name, engine, figures, f"{mean:.4f}", f"{max(mine) - min(mine):.4f}", away])
    return table(["", "engine", "by seed", "mean", "spread", f"less {rows[0]['engine']}'s"], lines, left=3)


def main() -> None:
    p = seeds_parser(__doc__, "float32,int8")
    p.add_argument("--data", choices=CASES, required=True)
    a = parse(p)
    if a.here:
        print(json.dumps(run(a.data, a, a.here["engine"], a.here["seed"])))
        return
    rows = run_all(a)
    found = losses_and_accuracies(rows)
    print(found)
    if a.write:
        how = "In full" if CASES[a.data].get("method") == "full" else "LoRA"
        text = f"{how}, dropout 0.1, seeds {a.seeds}. {CASES[a.data]}\n\n{found}"
        write_section(a.write, f"quality {a.data}", f"{a.data}: what few bits cost", command(p, a), rows, text)


if __name__ == "__main__":
    main()
