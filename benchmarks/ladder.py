"""From the tutorial to minift, one technique a row: what each of them gives, alone, in seconds and in memory.

    python benchmarks/ladder.py [--cases bert-imdb,gpt2-webnlg] [--rungs trainer,native,nf4] [--steps 6]

A step of 8 sequences, of BERT-base on IMDB reviews cut at 512 tokens or of GPT-2 on WebNLG's prompts and completions,
with random weights, all of which learn, and dropout 0.1. Data, order, models and timing are those of step.py, and every
rung sees the same batches. A rung is the one above it with one thing changed, and a fresh process.

trainer     transformers.Trainer, eager, every sequence padded to 512, as in the tutorial
loop        a plain PyTorch loop instead of the Trainer: fused AdamW, gradients clipped, the same batches
longest     a batch is padded to its longest sequence
compiled    torch.compile
nodrop      every dropout rate 0: what its masks cost. All further rungs have dropout 0.1 again
packed      minift, without padding; operators by their PyTorch references (--kernels reference). Its last layer is made
            to compute every token, as the peers' does: the batch asks about all, and what was wanted is taken from that
            (the head sees no more than that)
rows        the last layer computes the tokens asked about alone, as minift does
native      kernels in C++ (--kernels native)
lora        LoRA, r=8, on PEFT's default targets instead of all weights (--method lora)
int8        its frozen base in 8 bits (--base int8)
nf4         in 4 bits instead (--base nf4)
micro       micro-batches of 768 tokens (--tokens 768); until here a step is one, which is not minift's default for LoRA
recompute   a layer saves its input alone (--recompute)
bf16        activations and products in bfloat16 (--precision bf16)

Tokens are real ones: padding counts for nothing. "times as fast" and "of its memory" are beside the case's first rung.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from common import attempt, command, failures, make_parser, parse, table, told, write_section
from step import CASES as STEP_CASES
from step import QUICK, data_file, make_inputs, run_loop, run_minift, run_peer

CASES = {
    "bert-imdb": STEP_CASES["bert-full-imdb"],
    "gpt2-webnlg": STEP_CASES["gpt2-lora-webnlg"] | dict(method="full", pad=True),
}
WHOLE = 1 << 20  # tokens of a micro-batch: more than a step has
# rung -> (what is new, and that in the case as step.py takes it)
RUNGS = {
    "trainer": ("transformers.Trainer, padded to 512", dict(engine="peer", precision="fp32")),
    "loop": ("a plain PyTorch loop", dict(engine="loop")),
    "longest": ("padded to the longest of a batch", dict(pad=False)),
    "compiled": ("torch.compile", dict(compiled=True)),
    "nodrop": ("no dropout", dict(dropout=0.0)),
    "packed": (
        "minift: packed, reference operators, dropout again",
        dict(engine="minift", kernels="reference", tokens=WHOLE, last_layer="all tokens"),
    ),
    "rows": ("last layer for the rows asked about", dict(last_layer="rows")),
    "native": ("native kernels", dict(kernels="native")),
    "lora": ("LoRA", dict(method="lora")),
    "int8": ("a base in 8 bits", dict(method="int8")),
    "nf4": ("a base in 4 bits", dict(method="nf4")),
    "micro": ("micro-batches of 768 tokens", dict(tokens=768)),
    "recompute": ("recomputed layers", dict(recompute=True)),
    "bf16": ("bfloat16", dict(precision="bf16")),
}
FIRST = next(iter(RUNGS))
HEAD = ["case", "rung", "and now", "s a step", "tokens/s", "peak MB", "times as fast", "of its memory", "alone"]


def case_of(name: str, rung: str, quick: bool) -> dict:
    """The case of one rung: the changes of all rungs up to it."""
    case = CASES[name] | (QUICK if quick else {})
    for above, (_, change) in RUNGS.items():
        case = case | change
        if above == rung:
            break
    return case


def compute_all_tokens(model) -> None:
    """Makes a model's last layer compute every token: its body is asked about all, and gives those of batch.rows."""
    import torch

    from minift.ops.dropout import SILENT

    forward = model.body.forward

    def of_all(batch, noise=SILENT):
        everything = torch.arange(len(batch.ids))
        h = forward(dataclasses.replace(batch, rows=everything), noise)  # (N, C)
        return h.index_select(0, batch.rows)  # (M, C)

    model.body.forward = of_all


def measure(case: dict, work: Path, steps: int) -> dict:
    """The figures of one rung, in this process."""
    given = case, work / case["family"], data_file(case, work), steps
    if case["engine"] == "minift":
        changes = [compute_all_tokens] if case["last_layer"] == "all tokens" else []
        return run_minift(*given, *changes)
    return (run_peer if case["engine"] == "peer" else run_loop)(*given)


def words(rung: str) -> str:
    """What is new in a rung, and what a reader has to know of this machine."""
    import torch

    from minift.engine.precision import native_bf16

    fast, why = native_bf16(torch.device("cpu"))
    emulated = rung == "bf16" and not fast
    return RUNGS[rung][0] + (f" (emulated: {why})" if emulated else "")


def run_all(p: argparse.ArgumentParser, a: argparse.Namespace, work: Path) -> list[dict]:
    """A row for each rung of each case."""
    rows = []
    for name in a.cases.split(","):
        make_inputs(CASES[name], work, a)
        for rung in a.rungs.split(","):
            alone = argparse.Namespace(**vars(a) | {"cases": name, "rungs": rung})
            row = {"case": name, "rung": rung, "what": words(rung), "alone": command(p, alone)}
            rows.append(told(row | attempt({"case": name, "rung": rung, "work": str(work)})))
    return rows


def ladder_table(rows: list[dict]) -> str:
    """A line a rung; dashes for what could not be measured, and for ratios where the first rung was not."""
    firsts = {row["case"]: row for row in rows if row["rung"] == FIRST and "step_s" in row}
    lines = []
    for row in rows:
        first = firsts.get(row["case"])
        figures = ["-"] * 5
        if "step_s" in row:
            rate = row["tokens"] / row["step_s"]
            figures[:3] = f"{row['step_s']:.3f}", f"{rate:,.0f}", f"{row['peak_mb']:,.0f}"
        if "step_s" in row and first:
            figures[3:] = f"{first['step_s'] / row['step_s']:.2f}", f"{row['peak_mb'] / first['peak_mb']:.1%}"
        lines.append([row["case"], row["rung"], row["what"], *figures, f"`{row['alone']}`"])
    return table(HEAD, lines, left=3)


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--cases", default="bert-imdb", help=f"of {','.join(CASES)} (default %(default)s)")
    p.add_argument("--rungs", default=",".join(RUNGS), help="(default: all)")
    p.add_argument("--steps", type=int, default=6, help="at least 3 (default %(default)s)")
    a = parse(p, rungs="longest,packed,rows,bf16", steps=3)
    if a.here:
        case = case_of(a.here["case"], a.here["rung"], a.quick)
        print(json.dumps(measure(case, Path(a.here["work"]), a.steps)))
        return
    with tempfile.TemporaryDirectory() as work:
        rows = run_all(p, a, Path(work))
    found = ladder_table(rows) + failures(rows, "case", "rung")
    print(found)
    if a.write:
        text = f"""Random weights, real data, 8 sequences a step, float32 until the last rung. Each rung is the one
above with one thing changed; what each is stands at the head of the script.

{found}"""
        write_section(a.write, "ladder", "A training step, one technique after another", command(p, a), rows, text)


if __name__ == "__main__":
    main()
