"""One training step of BERT-base and GPT-2: minift, the Hugging Face stack, and the floor that no engine gets below.

    python benchmarks/step.py [--cases bert-full-imdb,gpt2-lora-webnlg] [--engines minift,peer,floor]

Weights are random, of the published sizes (BERT 30522 / 768 / 12 layers, GPT-2 50257 / 768 / 12, 1,024 positions); data
and tokenizers are real. On the CPU, float32 or as --precision says; dropout 0.1; LoRA r=8, alpha=32, dropout 0.1, on
PEFT's default targets; qlora: the base in NF4 with double quantisation. (ladder.py adds one technique after another.)

minift    minift.train, as its command line runs it; a case that ends in a number is the same with --tokens
peer      transformers.Trainer, PEFT, bitsandbytes. IMDB is padded to 512 as in the tutorial, the rest to the longest of
          the batch. No gradient checkpointing. bf16 is autocast's
loop      the same model and batches in a plain PyTorch loop: fused AdamW, gradients clipped, and no Trainer
compiled  that loop, its model by torch.compile
nodrop    that loop, not compiled, every dropout rate 0 (not among the defaults)
floor     the matrix products that a step needs at its real tokens: forward; the gradients of inputs where something
          below learns; those of weights that learn; the last layer and the head for the rows asked about. Each by
          torch.mm, and by the faster of torch.mm and oneDNN. Attention's products stand apart: they are torch.bmm's,
          causal ones counted by half. Measured just before each of minift's steps, so that a busy machine slows both;
          a ratio is the median of the steps'

Every engine runs in a fresh process, and they take turns. Seconds a step are the median without the first two (and what
is compiled has seen every shape before); memory is the largest resident size of the process at its last step. Where an
engine fails, the reason stands below the tables.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import (
    SEED,
    attempt,
    classified,
    command,
    draw,
    failures,
    in_turns,
    make_parser,
    make_trainer,
    parse,
    peak_mb,
    peer_model,
    plain_step,
    random_model,
    read_rows,
    seconds,
    table,
    told,
    write_rows,
    write_section,
)

CASES = {
    "bert-full-imdb": dict(family="bert", data="imdb", method="full", batch=8, max_length=512, pad=True),
    "bert-lora-sst2": dict(family="bert", data="sst2", method="lora", batch=32, max_length=128),
    "bert-qlora-imdb": dict(family="bert", data="imdb", method="nf4", batch=8, max_length=512, pad=True),
    "gpt2-lora-webnlg": dict(family="gpt2", data="webnlg", method="lora", batch=8, max_length=512),
    "gpt2-qlora-webnlg": dict(family="gpt2", data="webnlg", method="nf4", batch=8, max_length=512),
    "gpt2-lora-text": dict(family="gpt2", data="text", method="lora", batch=2, max_length=1024),
    "gpt2-full-text": dict(family="gpt2", data="text", method="full", batch=2, max_length=1024),
}
CASES["bert-qlora-imdb-768"] = CASES["bert-qlora-imdb"] | dict(tokens=768, like="bert-qlora-imdb")
LOOPS = {"loop": {}, "compiled": dict(compiled=True), "nodrop": dict(dropout=0.0)}  # what each does another way
ENGINES = ("floor", "minift", "peer", "loop", "compiled")
OPTIONS = ("tokens", "kernels", "recompute", "precision")  # of minift, which a case may have
QUICK = dict(max_length=64)
RANK = 8


class Sizes(NamedTuple):
    """Of a model: layers, C, the feed-forward part, H, V."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int


def sizes_of(folder: Path) -> Sizes:
    """Those that stand in the folder's config.json."""
    read = json.loads((folder / "config.json").read_text())
    if read["model_type"] == "gpt2":
        inner = read.get("n_inner") or 4 * read["n_embd"]
        return Sizes(read["n_layer"], read["n_embd"], inner, read["n_head"], read["vocab_size"])
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    return Sizes(*(read[name] for name in names))


def case_of(name: str, a: argparse.Namespace) -> dict:
    """A case by its name."""
    return CASES[name] | {"precision": a.precision} | (QUICK if a.quick else {})


def dtype_of(case: dict):
    """What activations are in."""
    import torch

    from minift.engine.precision import choose_dtype

    return choose_dtype(case["precision"], torch.device("cpu"))[0]


def data_file(case: dict, work: Path) -> Path:
    return work / f"{case['data']}.{'txt' if case['data'] == 'text' else 'jsonl'}"


def make_inputs(case: dict, work: Path, a: argparse.Namespace) -> None:
    """The model's folder, and a file with as many examples as the steps take: drawn at random, or blocks of text."""
    if not (work / case["family"]).is_dir():
        random_model(case["family"], work / case["family"], a.assets, small=a.quick)
    n = case["batch"] * a.steps
    path = data_file(case, work)
    if case["data"] == "text":
        path.write_text((a.assets / "data/tinyshakespeare/input.txt").read_text()[: (n + 1) * 1024 * 4])
    else:
        write_rows(path, draw(read_rows(a.assets, case["data"]), n))


def config(case: dict, model: Path, data: Path, out: Path, steps: int):
    """The options of `minift train`."""
    import minift

    return minift.TrainConfig(
        model=str(model),
        task="classify" if case["family"] == "bert" else "complete",
        data=str(data),
        out=str(out),
        method="full" if case["method"] == "full" else "lora",
        base=case["method"] if case["method"] in ("nf4", "int8") else "auto",
        steps=steps,
        batch=case["batch"],
        max_length=case["max_length"],
        seed=SEED,
        device="cpu",
        **{name: case[name] for name in OPTIONS if name in case},
    )


def run_minift(case: dict, model: Path, data: Path, steps: int, change: Callable = lambda model: None) -> dict:
    """Steps by minift, after `change` of the model; times and memory are those of its own metrics.jsonl."""
    import minift
    from minift.setup import load_model

    with tempfile.TemporaryDirectory() as temporary:
        options = config(case, model, data, Path(temporary, "run"), steps)
        loaded, tokenizer = load_model(options, ["0", "1"])
        change(loaded)
        minift.train(loaded, tokenizer, options)
        lines = [json.loads(line) for line in Path(options.out, "metrics.jsonl").read_text().splitlines()]
    found = [row for row in lines if "train/tokens" in row]
    times = [row["train/tokens"] / row["train/tokens_per_second"] for row in found]
    tokens = statistics.median(row["train/tokens"] for row in found[2:])
    return {"step_s": statistics.median(times[2:]), "tokens": tokens, "peak_mb": found[-1]["train/peak_memory"] / 2**20}


def peer_job(case: dict, folder: Path, data: Path):
    """(transformers' model, its tokenizer, the examples, what makes a batch of some)."""
    import transformers

    transformers.set_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = peer_model(case["family"], case["method"], folder, dtype_of(case), dropout=case.get("dropout", 0.1))
    padding = {"padding": "max_length", "max_length": case["max_length"]} if case.get("pad") else {}
    if case["family"] == "bert":
        collator = transformers.DataCollatorWithPadding(tokenizer, **padding)
    else:
        tokenizer.pad_token = tokenizer.eos_token
        collator = transformers.DataCollatorForSeq2Seq(tokenizer, **padding)
    return model, tokenizer, peer_rows(case, tokenizer, data), collator


def peer_figures(case: dict, rows: list[dict], times: list[float], peak: float) -> dict:
    """Of a peer that takes its steps in the order that minift has; peak: in MB."""
    counts = [len(row["input_ids"]) for row in draw(rows, len(rows))]
    n = case["batch"]
    tokens = [sum(counts[i * n : (i + 1) * n]) for i in range(len(times))]
    return {"step_s": statistics.median(times[2:]), "tokens": statistics.median(tokens[2:]), "peak_mb": peak}


def learning_rate(case: dict) -> float:
    return 5e-5 if case["method"] == "full" else 5e-4


def run_peer(case: dict, folder: Path, data: Path, steps: int) -> dict:
    """The same with transformers' Trainer, PEFT and bitsandbytes."""
    import torch
    import transformers

    model, tokenizer, rows, collator = peer_job(case, folder, data)
    times, peak = [], 0.0

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            nonlocal peak
            times[-1] += time.perf_counter()
            peak = peak_mb()

    with tempfile.TemporaryDirectory() as out:
        make_trainer(
            model,
            tokenizer,
            rows,
            out,
            case["batch"],
            learning_rate(case),
            max_steps=steps,
            seed=SEED,
            data_collator=collator,
            callbacks=[Clock()],
            use_cpu=True,
            bf16=dtype_of(case) == torch.bfloat16,
        ).train()
    return peer_figures(case, rows, times, peak)


def run_loop(case: dict, folder: Path, data: Path, steps: int) -> dict:
    """The same without the Trainer; what makes the batches is not timed there either."""
    model, _, rows, collator = peer_job(case, folder, data)
    step = plain_step(model, case.get("compiled", False), dtype_of(case), learning_rate(case))
    shuffled = draw(rows, len(rows))
    n = case["batch"]
    batches = [collator(shuffled[i * n : (i + 1) * n]) for i in range(steps)]
    if case.get("compiled"):  # for each shape, before anything is timed
        for batch in {batch["input_ids"].shape: batch for batch in batches}.values():
            step(batch)
    times = [seconds(lambda batch=batch: step(batch)) for batch in batches]
    return peer_figures(case, rows, times, peak_mb())


def peer_rows(case: dict, tokenizer, data: Path) -> list[dict]:
    """The examples as the Trainer takes them, not padded."""
    length = case["max_length"]
    if case["data"] == "text":
        ids = tokenizer(data.read_text())["input_ids"]
        blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return [{"input_ids": b, "attention_mask": [1] * length, "labels": b} for b in blocks]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    if case["family"] == "bert":
        return classified(tokenizer, rows, length, pad=False)
    found = []
    for row in rows:
        prompt, completion = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = [*prompt, *completion, tokenizer.eos_token_id][:length]
        labels = ([-100] * len(prompt) + ids[len(prompt) :])[:length]
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


# ---- the floor

# a product (m, k, n): m x k by k x n, laid out as in y = x W^T ("y"), dx = dy W ("x") or dW = dy^T x ("w")
Product = tuple[str, int, int, int]


def linear(n: int, width: int, out: int, dx: bool, dw: bool) -> list[Product]:
    """The products of a linear layer, width -> out, for n tokens."""
    return [
        ("y", n, width, out),
        *([("x", n, out, width)] if dx else []),
        *([("w", out, n, width)] if dw else []),
    ]


def lora(n: int, width: int, out: int, dx: bool) -> list[Product]:
    """Those of the update beside it: h, h B^T, g, dB, dA, g A."""
    return [*linear(n, width, RANK, dx, True), *linear(n, RANK, out, True, True)]


def products(case: dict, sizes: Sizes, n: int, m: int) -> list[Product]:
    """All products with weights in a step of n tokens, m of which are asked about."""
    full, found = case["method"] == "full", []
    layers, c, inner, _, vocabulary = sizes
    for layer in range(layers):
        below, at = full or layer > 0, n if layer < layers - 1 else m
        if case["family"] == "bert":
            for tokens, adapted in ((at, True), (n, False), (n, True)):  # query, key, value
                found += linear(tokens, c, c, below, full)
                found += lora(tokens, c, c, below) if adapted and not full else []
        else:
            fits = [(n, 3 * c)] if at == n else [(at, c), (n, 2 * c)]
            found += [p for tokens, out in fits for p in linear(tokens, c, out, below, full)]
            found += [] if full else lora(n, c, 3 * c, below)
        for width, out in ((c, c), (c, inner), (inner, c)):
            found += linear(at, width, out, True, full)
    return found + linear(m, c, c if case["family"] == "bert" else vocabulary, True, full)


def product_seconds(kind: str, m: int, k: int, n: int, dtype) -> tuple[float, float]:
    """The time of one product by torch.mm, and by the faster of it and oneDNN; each the better of two runs."""
    import torch

    a = torch.randn(k, m, dtype=dtype).t() if kind == "w" else torch.randn(m, k, dtype=dtype)
    b = torch.randn(n, k, dtype=dtype).t() if kind == "y" else torch.randn(k, n, dtype=dtype)
    out = torch.empty(m, n, dtype=dtype)
    usual = fastest(lambda: torch.mm(a, b, out=out))
    try:
        other = fastest(lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))
    except RuntimeError:  # bfloat16 on a CPU without instructions for it
        return usual, usual
    return usual, min(usual, other)


def attention_seconds(case: dict, sizes: Sizes, lengths: list[int]) -> float:
    """The time of attention's products in the layers that compute all tokens: Q K^T, P V, and four for gradients."""
    import torch

    total, few, heads, size = 0.0, case["data"] != "text", sizes.heads, sizes.width // sizes.heads
    dtype = dtype_of(case)
    for n in lengths:
        q, p = torch.randn(heads, n, size, dtype=dtype), torch.randn(heads, n, n, dtype=dtype)
        one = fastest(lambda q=q: torch.bmm(q, q.transpose(1, 2))) + fastest(lambda q=q, p=p: torch.bmm(p, q))
        total += one * 3 * (sizes.layers - few) * (1 if case["family"] == "bert" else 0.5)
    return total


def fastest(f: Callable) -> float:
    """Of two runs, in seconds."""
    return min(in_turns([f])[0])


def run_floor(case: dict, model: Path, data: Path, steps: int) -> dict:
    """Before each step of minift, in the same process, the products of that very step.

    Medians of both, and of their ratios, without the first two steps.
    """
    from minift import training

    step, found, sizes = training.train_step, [], sizes_of(model)

    def both(job, sequences: list, *rest):
        lengths, rows = [len(s) for s in sequences], sum(len(s.rows) for s in sequences)
        shapes = products(case, sizes, sum(lengths), rows)
        times = {shape: product_seconds(*shape, dtype_of(case)) for shape in set(shapes)}
        usual, floor = (sum(times[shape][i] for shape in shapes) for i in (0, 1))
        attention = attention_seconds(case, sizes, lengths)
        start = time.perf_counter()
        values = step(job, sequences, *rest)
        took = time.perf_counter() - start
        work = sum(2 * a * b * c for _, a, b, c in shapes)
        row = {"mm_s": usual, "floor_s": floor, "attention_s": attention, "gflops": work / floor / 1e9}
        ratios = {"to_mm": took / usual, "to_floor": took / floor, "with_attention": took / (floor + attention)}
        found.append(row | {"minift_s": took} | ratios)
        return values

    training.train_step = both
    run_minift(case, model, data, steps)
    return {key: statistics.median(row[key] for row in found[2:]) for key in found[0]}


# ---- all cases


Columns = dict[str, tuple[str, str, str]]  # head -> the engine, or two of them for a ratio; its figure; how it is shown
FLOOR: Columns = {
    "tokens": ("minift", "tokens", ",.0f"),
    "torch.mm s": ("floor", "mm_s", ".3f"),
    "floor s": ("floor", "floor_s", ".3f"),
    "attention s": ("floor", "attention_s", ".3f"),
    "minift s": ("minift", "step_s", ".3f"),
    "minift / torch.mm": ("floor", "to_mm", ".2f"),
    "minift / floor": ("floor", "to_floor", ".2f"),
    "with attention": ("floor", "with_attention", ".2f"),
}
PEERS = {
    "peer": "its Trainer (peer)",
    "loop": "a plain PyTorch loop (loop)",
    "compiled": "that loop with torch.compile (compiled)",
    "nodrop": "that loop without dropout (nodrop)",
}
BESIDE: Columns = {f"{engine} s": (engine, "step_s", ".3f") for engine in ("minift", *PEERS)}
BESIDE |= {f"{engine} / minift": (f"{engine} / minift", "step_s", ".2f") for engine in PEERS}
BESIDE |= {f"{engine} MB": (engine, "peak_mb", ",.0f") for engine in ("minift", *PEERS)}
RUNS = {"minift": run_minift, "peer": run_peer, "floor": run_floor} | dict.fromkeys(LOOPS, run_loop)


def cell(found: dict[str, dict], engines: str, key: str, form: str) -> str:
    """A figure of one engine, or its ratio of two; a dash for what was not run."""
    values = [found.get(engine, {}).get(key) for engine in engines.split(" / ")]
    if None in values:
        return "-"
    return format(values[0] if len(values) == 1 else values[0] / values[1], form)


def steps_table(rows: list[dict], columns: Columns) -> str:
    """A line a case; without the columns of engines that were not asked for, and nothing where none is left."""
    engines = {row["engine"] for row in rows}
    shown = {head: column for head, column in columns.items() if engines.issuperset(column[0].split(" / "))}
    if not shown:
        return ""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["engine"]: row for row in rows if row["case"] == case}
        lines.append([case, *(cell(found, *column) for column in shown.values())])
    return table(["case", *shown], lines)


def peers_in_words(engines: list[str]) -> str:
    """A sentence about the peers that were run, if there were any."""
    ran = [PEERS[engine] for engine in engines if engine in PEERS]
    if not ran:
        return ""
    return f" Below: transformers by {', '.join(ran)}."


def run_all(a: argparse.Namespace, work: Path) -> list[dict]:
    """A row for each case and engine, by a process of its own; `work` keeps models and data."""
    rows = []
    figures: dict[tuple[str, str], dict] = {}
    for name in a.cases.split(","):
        case = case_of(name, a)
        make_inputs(case, work, a)
        for engine in a.engines.split(","):
            row = {"case": name, "engine": engine}
            key = (case.get("like", name) if engine in PEERS else name, engine)
            if key not in figures:
                figures[key] = attempt(row | {"work": str(work)})
            rows.append(told(row | figures[key]))
    return rows


def main() -> None:
    p = make_parser(__doc__)
    p.add_argument("--cases", default=",".join(CASES))
    p.add_argument("--engines", default=",".join(ENGINES))
    p.add_argument("--steps", type=int, default=6, help="at least 3 (default %(default)s)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="fp32", help="(default %(default)s)")
    p.add_argument("--work", type=Path, help="where models and data are kept; a temporary folder if none is named")
    a = parse(p, cases="gpt2-qlora-webnlg", engines="floor,minift,peer,loop", steps=3)
    if a.here:
        engine, work = a.here["engine"], Path(a.here["work"])
        case = case_of(a.here["case"], a) | LOOPS.get(engine, {})
        print(json.dumps(RUNS[engine](case, work / case["family"], data_file(case, work), a.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        work.mkdir(exist_ok=True, parents=True)
        rows = run_all(a, work)
    tables = [steps_table(rows, columns) for columns in (FLOOR, BESIDE)]
    found = "\n\n".join(filter(None, tables)) + failures(rows, "case", "engine")
    print(found)
    if a.write:
        text = f"""{a.precision}, dropout 0.1, LoRA r=8 with dropout 0.1; random weights, real data. Seconds a step. The
products that a step needs, without attention's, which stand beside: by torch.mm, and ("floor") each by the faster of
torch.mm and oneDNN.{peers_in_words(a.engines.split(","))}

{found}"""
        title = "One training step: minift, the Hugging Face stack, and the matrix products alone"
        key, title = ("step", title) if a.precision == "fp32" else (f"step {a.precision}", f"{title}, {a.precision}")
        write_section(a.write, key, title, command(p, a), rows, text)


if __name__ == "__main__":
    main()
