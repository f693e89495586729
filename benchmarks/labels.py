"""Labels that were changed before a training, by the list of what the run never learned: how many are found?

    python benchmarks/labels.py --seeds 42,43,44                                    SST-2's 6,920 sentences
    python benchmarks/labels.py --seeds 42,43,44 --files SST-2/train.tsv            GLUE's SST-2, 67,349 phrases

MiniLM (6 layers, width 384) in full, linear schedule. A seed draws whose label is changed to the other one, orders the
examples, and draws the dropout. The list is that of `minift report`: whatever had, in no epoch after the first, the
larger half of the probability for its label; all from the losses of the training itself, without a further pass.

found: of the changed labels, those on the list. right: of the list, those that were changed. The same is told of the
examples with the largest mean loss, as many as were changed. Each seed runs in a fresh process.

--files: tab-separated, text and label, 0 or 1, after a line with their names, as in
https://dl.fbaipublicfiles.com/glue/data/SST-2.zip.
"""

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path

from common import command, draw, fresh, make_parser, parse, read_rows, table, told, write_rows, write_section

OTHER = 1_000_000  # a seed's labels are drawn by this and the seed
HEAD = ["seed", "examples", "changed", "on the list", "found", "right", "by mean loss"]


def rows_to_train_on(a: argparse.Namespace) -> list[dict]:
    """Texts and labels, as they were published."""
    if a.files:
        return [row for path in a.files.split(",") for row in rows_of(Path(path))]
    rows = read_rows(a.assets, "sst2")
    return draw(rows, 256) if a.quick else rows


def rows_of(path: Path) -> list[dict]:
    """The rows of a file of GLUE."""
    with open(path, newline="", encoding="utf-8") as f:
        next(f)
        lines = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [{"text": text.strip(), "label": int(label)} for text, label in lines]


def run(a: argparse.Namespace, seed: int) -> dict:
    """Changes labels, trains, and counts which of them are on the list."""
    import torch

    import minift
    from minift.measure.report import Seen
    from minift.reporting import hardest_first
    from minift.setup import load_model

    rows = rows_to_train_on(a)
    # another generator than that of the training's order, in which the changed ones would else come first
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(OTHER + seed))
    changed = set(shuffled[: round(a.share * len(rows))].tolist())
    for number in changed:
        rows[number]["label"] = 1 - rows[number]["label"]

    with tempfile.TemporaryDirectory() as temporary:
        config = minift.TrainConfig(
            model=str(a.assets / "weights/all-MiniLM-L6-v2"),
            data=str(write_rows(Path(temporary, "train.jsonl"), rows)),
            out=str(Path(temporary, "run")),
            epochs=a.epochs,
            batch=a.batch,
            lr=a.lr,
            precision=a.precision,
            max_length=128,
            seed=seed,
        )
        model, tokenizer = load_model(config, ["0", "1"])
        minift.train(model, tokenizer, config)
        ranked = hardest_first(Seen("run", Path(config.out)))
    never_learned = {one.number for one in ranked if one.never_learned}
    largest = {one.number for one in ranked[: len(changed)]}
    return {
        "examples": len(rows),
        "changed": len(changed),
        "listed": len(never_learned),
        "found": len(never_learned & changed) / len(changed),
        "right": len(never_learned & changed) / max(1, len(never_learned)),
        "by_mean_loss": len(largest & changed) / len(changed),
    }


def figures(rows: list[dict]) -> str:
    """A row per seed, then the means."""
    lines = []
    for r in rows:
        counts = [f"{r[key]:,}" for key in ("examples", "changed", "listed")]
        shares = [f"{r[key]:.1%}" for key in ("found", "right", "by_mean_loss")]
        lines.append([str(r["seed"]), *counts, *shares])
    if len(rows) > 1:
        means = [f"{statistics.mean(r[key] for r in rows):.1%}" for key in ("found", "right", "by_mean_loss")]
        lines.append(["mean", "", "", "", *means])
    return table(HEAD, lines)


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--files", default="", help="files of GLUE's form instead, with a comma between two")
    p.add_argument("--share", type=float, default=0.05, help="of the labels that are changed (default %(default)s)")
    p.add_argument("--epochs", type=int, default=3, help="(default %(default)s)")
    p.add_argument("--batch", type=int, default=32, help="(default %(default)s)")
    p.add_argument("--lr", type=float, default=3e-5, help="(default %(default)s)")
    p.add_argument("--precision", default="fp32", help="(default %(default)s)")
    p.add_argument("--seeds", default="42", help="(default %(default)s)")
    a = parse(p, epochs=2)
    if a.here:
        print(json.dumps(run(a, a.here["seed"])))
        return
    rows = []
    for seed in a.seeds.split(","):
        case = {"seed": int(seed)}
        rows.append(told(case | fresh(case)))
    found = figures(rows)
    print(found)
    if a.write:
        how = f"MiniLM in full, {a.epochs} epochs, batch {a.batch}, lr {a.lr}, {a.precision}"
        title = "Labels that were changed, found by what was never learned"
        key = "labels of files" if a.files else "labels"
        text = f"{how}; {a.share:.0%} of the labels changed.\n\n{found}"
        write_section(a.write, key, title, command(p, a), rows, text)


if __name__ == "__main__":
    main()
