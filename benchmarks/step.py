"""One training step of BERT-base and GPT-2: minift, the Hugging Face stack, and the floor that no engine gets below.

    python benchmarks/step.py --assets ../shared [--cases bert-full-imdb,gpt2-lora-webnlg] [--engines minift,peer,floor]

Weights are random, of the published sizes (BERT 30522 / 768 / 12 layers, GPT-2 50257 / 768 / 12, 1,024 positions); data
and tokenizers are real. float32; dropout 0.1 everywhere; LoRA r=8, alpha=32, dropout 0.1, on PEFT's default targets;
qlora: the base in NF4 with double quantisation.

minift    minift.train, as its command line runs it; a case that ends in a number is the same with --tokens
peer      transformers.Trainer, PEFT, bitsandbytes. IMDB is padded to 512 as in the tutorial, the rest to the longest of
          the batch. No gradient checkpointing
floor     the matrix products that a step needs at its real tokens: forward; the gradients of inputs where something
          below learns; those of weights that learn; the last layer and the head for the rows asked about. Each by
          torch.mm, and by the faster of torch.mm and oneDNN. Attention's products stand apart: they are torch.bmm's,
          causal ones counted by half. Measured just before each of minift's steps, so that a busy machine slows both;
          a ratio is the median of the steps'

Every engine runs in a fresh process, and they take turns. Seconds a step are the median without the first two;
memory is the largest resident size of the process at its last step.
"""

import argparse
import csv
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "bert-full-imdb": dict(family="bert", data="imdb", method="full", batch=8, max_length=512),
    "bert-lora-sst2": dict(family="bert", data="sst2", method="lora", batch=32, max_length=128),
    "bert-qlora-imdb": dict(family="bert", data="imdb", method="qlora", batch=8, max_length=512),
    "gpt2-lora-webnlg": dict(family="gpt2", data="webnlg", method="lora", batch=8, max_length=512),
    "gpt2-qlora-webnlg": dict(family="gpt2", data="webnlg", method="qlora", batch=8, max_length=512),
    "gpt2-lora-text": dict(family="gpt2", data="text", method="lora", batch=2, max_length=1024),
    "gpt2-full-text": dict(family="gpt2", data="text", method="full", batch=2, max_length=1024),
}
CASES["bert-qlora-imdb-768"] = CASES["bert-qlora-imdb"] | dict(tokens=768, like="bert-qlora-imdb")
ENGINES = ("floor", "minift", "peer")
SEED, RANK, LAYERS, WIDTH, INNER, HEADS, VOCABULARY = 42, 8, 12, 768, 3072, 12, 50257


def make_model(family: str, folder: Path, assets: Path) -> None:
    """A random model of the published size, with its tokenizer, as a hub folder."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig())
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model.save_pretrained(folder)
    names = {"bert": ("vocab.txt", "tokenizer.json", "tokenizer_config.json"), "gpt2": ("vocab.json", "merges.txt")}
    for name in names[family]:
        source = assets / "weights/tokenizers" / {"bert": "bert-base-uncased", "gpt2": "gpt2"}[family] / name
        (folder / name).write_bytes(source.read_bytes())


def make_data(kind: str, n: int, path: Path, assets: Path) -> None:
    """A file with n examples: drawn at random with a fixed seed, or n blocks of text."""
    import torch

    folder = assets / "data"
    if kind == "text":
        path.write_text((folder / "tinyshakespeare/input.txt").read_text()[: (n + 1) * 1024 * 4])
        return
    if kind == "imdb":
        with gzip.open(folder / "imdb/train.jsonl.gz", "rt", encoding="utf-8") as f:
            rows = [{"text": row["text"], "label": row["label"]} for row in map(json.loads, f)]
    elif kind == "sst2":
        with open(folder / "sst2-sentences/train.tsv", newline="", encoding="utf-8") as f:
            rows = [{"text": t, "label": int(y)} for t, y in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    else:
        rows = [json.loads(line) for line in open(folder / "webnlg/train.jsonl", encoding="utf-8")]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))[:n].tolist()
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in chosen))


def config(case: dict, model: Path, data: Path, out: Path, steps: int):
    """The options of `minift train`."""
    import minift

    return minift.TrainConfig(
        model=str(model),
        task="classify" if case["family"] == "bert" else "complete",
        data=str(data),
        out=str(out),
        method="full" if case["method"] == "full" else "lora",
        base="nf4" if case["method"] == "qlora" else "auto",
        steps=steps,
        batch=case["batch"],
        tokens=case.get("tokens", 0),
        max_length=case["max_length"],
        seed=SEED,
    )


def run_minift(case: dict, model: Path, data: Path, steps: int) -> dict:
    """Steps by minift; times and memory are those of its own metrics.jsonl."""
    import minift
    from minift.setup import load_model

    with tempfile.TemporaryDirectory() as temporary:
        options = config(case, model, data, Path(temporary, "run"), steps)
        minift.train(*load_model(options, ["0", "1"]), options)
        found = [json.loads(line) for line in Path(options.out, "metrics.jsonl").read_text().splitlines()]
    found = [row for row in found if "train/tokens" in row]
    times = [row["train/tokens"] / row["train/tokens_per_second"] for row in found]
    tokens = statistics.median(row["train/tokens"] for row in found[2:])
    return {"step_s": statistics.median(times[2:]), "tokens": tokens, "peak_mb": found[-1]["train/peak_memory"] / 2**20}


def run_peer(case: dict, folder: Path, data: Path, steps: int) -> dict:
    """The same with transformers, PEFT and bitsandbytes."""
    import peft
    import torch
    import transformers
    from peers import peak_mb

    bert, method = case["family"] == "bert", case["method"]
    transformers.set_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.AutoModelForSequenceClassification if bert else transformers.AutoModelForCausalLM
    options = {"num_labels": 2} if bert else {}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["classifier", "bert.pooler.dense", "lm_head"],
        )
    model = kind.from_pretrained(folder, dtype=torch.float32, **options)
    if method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if method != "full":
        task = "SEQ_CLS" if bert else "CAUSAL_LM"
        lora = peft.LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.1, task_type=task, fan_in_fan_out=not bert)
        model = peft.get_peft_model(model, lora)
    if not bert:
        tokenizer.pad_token = tokenizer.eos_token
    times, peak = [], 0.0

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            nonlocal peak
            times[-1] += time.perf_counter()
            peak = peak_mb()

    with tempfile.TemporaryDirectory() as out:
        transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=out,
                max_steps=steps,
                learning_rate=5e-5 if method == "full" else 5e-4,
                seed=SEED,
                per_device_train_batch_size=case["batch"],
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=peer_rows(case, tokenizer, data),
            data_collator=transformers.DataCollatorWithPadding(tokenizer)
            if bert
            else transformers.DataCollatorForSeq2Seq(tokenizer),
            callbacks=[Clock()],
        ).train()
    return {"step_s": statistics.median(times[2:]), "peak_mb": peak}


def peer_rows(case: dict, tokenizer, data: Path) -> list[dict]:
    """The examples as the Trainer takes them."""
    length = case["max_length"]
    if case["data"] == "text":
        ids = tokenizer(data.read_text())["input_ids"]
        blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return [{"input_ids": b, "attention_mask": [1] * length, "labels": b} for b in blocks]
    rows, found = [json.loads(line) for line in data.read_text().splitlines()], []
    for row in rows:
        if case["family"] == "bert":
            padding = "max_length" if case["data"] == "imdb" else False
            found.append({**tokenizer(row["text"], truncation=True, max_length=length, padding=padding)})
            found[-1]["labels"] = row["label"]
        else:
            prompt, completion = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
            ids = [*prompt, *completion, tokenizer.eos_token_id]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
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


def products(case: dict, n: int, m: int) -> list[Product]:
    """All products with weights in a step of n tokens, m of which are asked about."""
    full, found = case["method"] == "full", []
    for layer in range(LAYERS):
        below, at = full or layer > 0, n if layer < LAYERS - 1 else m
        if case["family"] == "bert":
            for tokens, adapted in ((at, True), (n, False), (n, True)):  # query, key, value
                found += linear(tokens, WIDTH, WIDTH, below, full)
                found += lora(tokens, WIDTH, WIDTH, below) if adapted and not full else []
        else:
            fits = [(n, 3 * WIDTH)] if at == n else [(at, WIDTH), (n, 2 * WIDTH)]
            found += [p for tokens, out in fits for p in linear(tokens, WIDTH, out, below, full)]
            found += [] if full else lora(n, WIDTH, 3 * WIDTH, below)
        for width, out in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)):
            found += linear(at, width, out, True, full)
    return found + linear(m, WIDTH, WIDTH if case["family"] == "bert" else VOCABULARY, True, full)


def seconds(kind: str, m: int, k: int, n: int) -> tuple[float, float]:
    """The time of one product by torch.mm, and by the faster of it and oneDNN; each the better of two runs."""
    import torch

    a = torch.randn(k, m).t() if kind == "w" else torch.randn(m, k)
    b = torch.randn(n, k).t() if kind == "y" else torch.randn(k, n)
    out = torch.empty(m, n)
    usual = fastest(lambda: torch.mm(a, b, out=out))
    return usual, min(usual, fastest(lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")))


def attention_seconds(case: dict, lengths: list[int]) -> float:
    """The time of attention's products in the layers that compute all tokens: Q K^T, P V, and four for gradients."""
    import torch

    total, few, size = 0.0, case["data"] != "text", WIDTH // HEADS
    for n in lengths:
        q, p = torch.randn(HEADS, n, size), torch.randn(HEADS, n, n)
        one = fastest(lambda q=q: torch.bmm(q, q.transpose(1, 2))) + fastest(lambda q=q, p=p: torch.bmm(p, q))
        total += one * 3 * (LAYERS - few) * (1 if case["family"] == "bert" else 0.5)
    return total


def fastest(f) -> float:
    """Of two runs, in seconds."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - start)
    return best


def run_floor(case: dict, model: Path, data: Path, steps: int) -> dict:
    """Before each step of minift, in the same process, the products of that very step: medians of both, and of their
    ratio, without the first two."""
    from importlib import import_module

    train, found = import_module("minift.training"), []
    step = train.train_step

    def both(job, sequences: list, *rest):
        lengths, rows = [len(s) for s in sequences], sum(len(s.rows) for s in sequences)
        shapes = products(case, sum(lengths), rows)
        times = {shape: seconds(*shape) for shape in set(shapes)}
        usual, floor = (sum(times[shape][i] for shape in shapes) for i in (0, 1))
        attention = attention_seconds(case, lengths)
        start = time.perf_counter()
        values = step(job, sequences, *rest)
        took = time.perf_counter() - start
        work = sum(2 * a * b * c for _, a, b, c in shapes)
        row = {"mm_s": usual, "floor_s": floor, "attention_s": attention, "gflops": work / floor / 1e9}
        ratios = {"to_mm": took / usual, "to_floor": took / floor, "with_attention": took / (floor + attention)}
        found.append(row | {"minift_s": took} | ratios)
        return values

    train.train_step = both
    run_minift(case, model, data, steps)
    return {key: statistics.median(row[key] for row in found[2:]) for key in found[0]}


# ---- all cases


def table(rows: dict[str, dict[str, dict]]) -> str:
    """A line a case; what was not run is a dash."""
    head = ("case", "tokens", "torch.mm s", "floor s", "attention s", "minift s", "peer s", "minift / torch.mm")
    head += ("minift / floor", "with attention", "peer / minift", "minift MB", "peer MB", "minift / peer MB")
    lines = [head]
    for case, found in rows.items():
        floor, ours, peer = (found.get(engine, {}) for engine in ENGINES)

        def ratio(a: float | None, b: float | None) -> str:
            return f"{a / b:.2f}" if a and b else "-"

        def shown(row: dict, key: str, form: str = ".3f") -> str:
            return format(row[key], form) if key in row else "-"

        times = [row.get("step_s") for row in (ours, peer)]
        lines.append(
            (
                case,
                shown(ours, "tokens", ",.0f"),
                *(shown(floor, f"{what}_s") for what in ("mm", "floor", "attention")),
                *(shown(row, "step_s") for row in (ours, peer)),
                *(shown(floor, what, ".2f") for what in ("to_mm", "to_floor", "with_attention")),
                ratio(times[1], times[0]),
                *(shown(row, "peak_mb", ",.0f") for row in (ours, peer)),
                ratio(ours.get("peak_mb"), peer.get("peak_mb")),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
             for line in lines]  # fmt: skip
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def write(path: Path, rows: dict, options: str) -> None:
    """Replaces this script's section of the results file."""
    from importlib.metadata import version

    cpu = Path("/proc/cpuinfo").read_text()
    name, cores = cpu.split("model name")[1].split("\n")[0].strip("\t :"), cpu.count("processor\t")
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft", "bitsandbytes"))
    begin, end = "<!-- step -->", "<!-- end step -->"
    section = f"""{begin}
## One training step: minift, the Hugging Face stack, and the matrix products alone

`python benchmarks/step.py --assets ../shared{options}` on {time.strftime("%Y-%m-%d")}:
{name}, {cores} cores; {versions}.
float32, dropout 0.1, LoRA r=8 with dropout 0.1; random weights, real data. Seconds a step. The products that a step
needs, without attention's, which stand beside: by torch.mm, and ("floor") each by the faster of torch.mm and oneDNN.

{table(rows)}
{end}
"""
    old = path.read_text() if path.exists() else "# Results\n\nWritten by the scripts in this folder; do not edit.\n\n"
    before, _, rest = old.partition(begin)
    path.write_text(before + section + (rest.partition(end)[2].lstrip("\n") if rest else ""))


def here(a: argparse.Namespace) -> None:
    """One engine and one case in this process, or what they need."""
    if a.here == "make":
        make_model(a.cases, a.work / a.cases, a.assets)
        return
    case = CASES[a.cases]
    data = a.work / (case["data"] + (".txt" if case["data"] == "text" else ".jsonl"))
    if a.here == "data":
        make_data(case["data"], case["batch"] * a.steps, data, a.assets)
        return
    run = {"minift": run_minift, "peer": run_peer, "floor": run_floor}[a.here]
    print(json.dumps(run(case, a.work / case["family"], data, a.steps)))


def main() -> None:
    """Every engine and case in a process of its own; one JSON line each, and a table at the end."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--assets", type=Path, required=True, help="the folder with data/ and weights/")
    p.add_argument("--cases", default=",".join(CASES))
    p.add_argument("--engines", default=",".join(ENGINES))
    p.add_argument("--steps", type=int, default=6, help="at least 3 (default %(default)s)")
    p.add_argument("--write", type=Path, help="the results file whose section to replace, as benchmarks/RESULTS.md")
    p.add_argument("--work", type=Path, help="where models and data are kept; a temporary folder if none is named")
    p.add_argument("--here", help=argparse.SUPPRESS)  # how the script calls itself
    a = p.parse_args()
    if a.here:
        return here(a)
    rows: dict[str, dict[str, dict]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = a.work or Path(temporary)
        work.mkdir(exist_ok=True, parents=True)

        def call(what: str, case: str) -> str:
            options = ["--assets", str(a.assets), "--work", str(work), "--steps", str(a.steps), "--cases", case]
            command = [sys.executable, __file__, *options, "--here", what]
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

        cases = a.cases.split(",")
        for family in {CASES[case]["family"] for case in cases}:
            if not (work / family).is_dir():
                call("make", family)
        for case in cases:
            call("data", case)
            for engine in a.engines.split(","):
                if engine == "peer" and "like" in CASES[case]:
                    rows[case][engine] = rows.get(CASES[case]["like"], {}).get(engine, {})
                    continue
                rows.setdefault(case, {})[engine] = json.loads(call(engine, case).strip().splitlines()[-1])
                print(json.dumps({"case": case, "engine": engine, **rows[case][engine]}), flush=True)
    print(table(rows))
    if a.write:
        given = [f" --{k} {getattr(a, k)}" for k in ("cases", "engines", "steps") if getattr(a, k) != p.get_default(k)]
        write(a.write, rows, "".join(given))


if __name__ == "__main__":
    main()
