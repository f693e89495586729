"""What the benchmarks share: fresh processes, timing, data, models, the peers, tables and RESULTS.md.

A script calls itself once per case, with its own arguments and `--here CASE`, so that every figure is that of a fresh
process. torch and the peers are imported where they are used: the process that only starts others stays small.
"""

import argparse
import csv
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SEED = 42
PEERS = ("transformers", "peft", "bitsandbytes")
UNTOLD = {
    "assets",
    "write",
    "here",
    "rows",
    "note",
    "work",
    "quick",
}  # options that a reader of the results need not repeat
DROPOUTS = {  # where a configuration of transformers has its rates
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
}
TOKENIZERS = {
    "bert": ("bert-base-uncased", ("vocab.txt", "tokenizer.json", "tokenizer_config.json")),
    "gpt2": ("gpt2", ("vocab.json", "merges.txt")),
}

# ---- the command line, and a fresh process for each case


def make_parser(doc: str, needs_assets: bool = True) -> argparse.ArgumentParser:
    """The options that all scripts have; `doc` is the script's docstring."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = os.environ.get("MINIFT_ASSETS")
    p.add_argument(
        "--assets",
        type=Path,
        default=assets and Path(assets),
        required=needs_assets and not assets,
        help="the folder with data/ and weights/ that assets.py fills (default: MINIFT_ASSETS)",
    )
    p.add_argument("--write", type=Path, help="the results file whose section to replace, as benchmarks/RESULTS.md")
    p.add_argument("--quick", action="store_true", help="small shapes and few steps, under a minute: does it run?")
    p.add_argument("--here", type=json.loads, help=argparse.SUPPRESS)  # a case; how a script calls itself
    return p


def parse(p: argparse.ArgumentParser, **quick) -> argparse.Namespace:
    """The options given; with --quick, those that are not given are those of `quick`."""
    if "--quick" in sys.argv:
        p.set_defaults(**quick)
    a = p.parse_args()
    if a.quick and a.write:
        p.error("--quick is given with --write; its figures are of small shapes, and no results")
    return a


def launcher(processes: int) -> list[str]:
    """The words that a script, or -m and a module, follow; they start it in so many processes of one run."""
    if processes == 1:
        return [sys.executable]
    here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *here]


def fresh(case: dict, processes: int = 1, **options) -> dict:
    """The JSON object that this script prints for `--here case`, in a process of its own, or in several.

    options: for subprocess.run. Raises subprocess.CalledProcessError if the process fails.
    """
    command = [*launcher(processes), *sys.argv, "--here", json.dumps(case)]
    options = {"stdout": subprocess.PIPE, "text": True, "check": True} | options
    return json.loads(subprocess.run(command, **options).stdout.strip().splitlines()[-1])


def attempt(case: dict) -> dict:
    """What `fresh` returns or, where that process fails, {"why": its error in one line}; the error's end is printed."""
    try:
        return fresh(case, stderr=subprocess.PIPE)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        print("\n".join(lines[-25:]), file=sys.stderr, flush=True)
        return {"why": reason(lines, error.returncode)}


def reason(lines: list[str], code: int) -> str:
    """Why a process failed, by its standard error: the last line that names an error (torch puts advice below it)."""
    if code < 0:
        return f"ended by signal {-code}"
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Failed|Unsupported)\b", line)]
    return (named or lines or [f"exit code {code}"])[-1][:160]


def told(row: dict) -> dict:
    """The row, printed as a JSON line as soon as it is there."""
    print(json.dumps(row), flush=True)
    return row


def peak_mb() -> float:
    """Peak resident memory of this process in MB (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# ---- timing


def seconds(f: Callable) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def in_turns(functions: list[Callable], rounds: int = 2, at_least: float = 0) -> list[list[float]]:
    """Seconds of each function in each round; they take turns, so that a busy machine slows all alike.

    rounds: how many, and more until `at_least` seconds have passed.
    """
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + at_least
    while len(times[-1]) < rounds or time.perf_counter() < end:
        for f, found in zip(functions, times, strict=True):
            found.append(seconds(f))
    return times


# ---- data and models


def read_rows(assets: Path, data: str, split: str = "train") -> list[dict]:
    """A data set as minift's JSON lines: imdb, sst2 (text, label), rte (and pair) or webnlg (prompt, completion)."""
    folder = assets / "data"
    if data == "imdb":
        with gzip.open(folder / f"imdb/{split}.jsonl.gz", "rt", encoding="utf-8") as f:
            return [{"text": row["text"], "label": row["label"]} for row in map(json.loads, f)]
    if data == "sst2":
        with open(folder / f"sst2-sentences/{split}.tsv", newline="", encoding="utf-8") as f:
            lines = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [{"text": text, "label": int(label)} for text, label in lines]
    if data == "rte":
        with open(folder / f"glue-rte/{split}.tsv", newline="", encoding="utf-8") as f:
            rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [{"text": r["sentence1"], "pair": r["sentence2"], "label": r["label"]} for r in rows]
    with open(folder / f"webnlg/{split}.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def draw(rows: list, n: int) -> list:
    """n of the rows at random, always the same ones."""
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    return [rows[i] for i in order[:n].tolist()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_model(family: str, folder: Path, assets: Path | None = None, small: bool = False) -> None:
    """A hub folder with random weights of the published sizes (bert: a classifier of two classes), or small ones.

    With assets, the tokenizer's files are in it.
    """
    import torch
    import transformers

    torch.manual_seed(SEED)
    if family == "bert":
        sizes = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128) if small else {}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **sizes))
    else:
        sizes = dict(n_layer=2, n_embd=64, n_head=2) if small else {}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    model.save_pretrained(folder)
    if assets:
        copy_tokenizer(family, folder, assets)


def copy_tokenizer(family: str, folder: Path, assets: Path) -> None:
    kind, names = TOKENIZERS[family]
    for name in names:
        (folder / name).write_bytes((assets / "weights/tokenizers" / kind / name).read_bytes())


# ---- the peers


def with_lora(model, family: str, dropout: float = 0.1):
    """PEFT's LoRA at the settings that minift has where nothing else is said, on PEFT's default targets."""
    import peft

    task, turned = ("SEQ_CLS", False) if family == "bert" else ("CAUSAL_LM", True)
    lora = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=dropout, task_type=task, fan_in_fan_out=turned)
    return peft.get_peft_model(model, lora)


def peer_model(family: str, method: str, folder: Path, dtype, device: str = "cpu", dropout: float = 0.1):
    """transformers' model: full; lora (PEFT); nf4 (the same over bitsandbytes, double quantisation).

    dtype: of the weights that stay frozen, and in which NF4 computes; those of full are float32. dropout: every rate.
    """
    import torch
    import transformers

    if family == "bert":
        kind = transformers.AutoModelForSequenceClassification
    else:
        kind = transformers.AutoModelForCausalLM
    options = {"dtype": torch.float32 if method == "full" else dtype}
    options |= dict.fromkeys(DROPOUTS[family], dropout)
    if method == "nf4":
        options["device_map"] = {"": device}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["classifier", "bert.pooler.dense", "lm_head"],
        )
    model = kind.from_pretrained(folder, **options)
    if method != "full":
        model = with_lora(model, family, dropout)
    return model.to(device)


def plain_step(model, compiled: bool, dtype, lr: float = 5e-5, weight_decay: float = 0.0) -> Callable[[dict], None]:
    """A training step as a plain PyTorch loop has it: batch -> None, for a batch as the model's keywords, labels too.

    compiled: by torch.compile. dtype: bfloat16 is autocast's. Fused AdamW, gradients clipped to a norm of 1.
    """
    import torch

    model.train()
    device = next(model.parameters()).device
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=weight_decay, fused=True)
    run = torch.compile(model) if compiled else model

    def step(batch: dict) -> None:
        given = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = run(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as a log line would

    return step


def classified(tokenizer, rows: list[dict], length: int, pad: bool) -> list[dict]:
    """Texts and labels as the Trainer takes them; pad: all to `length`, else each batch to its longest."""
    padding = "max_length" if pad else False
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=length, padding=padding)
    return [{key: encoded[key][i] for key in encoded} | {"labels": row["label"]} for i, row in enumerate(rows)]


def make_trainer(model, tokenizer, rows: list[dict], out: str, batch: int, lr: float, **options):
    """transformers.Trainer: fused AdamW, linear schedule, nothing saved or reported.

    options: of TrainingArguments, and of Trainer: eval_dataset, compute_metrics, callbacks, data_collator.
    """
    import transformers

    own = {key: options.pop(key) for key in ("eval_dataset", "compute_metrics", "callbacks") if key in options}
    collator = options.pop("data_collator", None) or transformers.DataCollatorWithPadding(tokenizer)
    arguments = transformers.TrainingArguments(
        output_dir=out,
        learning_rate=lr,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, **own)


# ---- results


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; its first `left` columns are words, the others figures."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def failures(rows: list[dict], *names: str) -> str:
    """A list, to stand below a table, of the rows that have no figures: which by their `names`, and why."""
    lines = [f"- {', '.join(row[name] for name in names)}: {row['why']}" for row in rows if "why" in row]
    return "\n\n" + "\n".join(lines) if lines else ""


def machine(*more: str) -> str:
    """The CPU, what `more` names, and the libraries that figures belong to."""
    name = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists() and "model name" in info.read_text():
        name = info.read_text().split("model name")[1].split("\n")[0].strip("\t :")
    versions = []
    for package in ("torch", *PEERS):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    hardware = ", ".join((name, f"{os.cpu_count()} cores", *more))
    return f"{hardware}; {', '.join(versions)}"


def command(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """How to run this again; paths are left out."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for key, value in vars(given).items():
        if key not in UNTOLD and value != parser.get_default(key):
            words += [f"--{key.replace('_', '-')}"] if value is True else [f"--{key.replace('_', '-')}", str(value)]
    return " ".join(words)


def write_section(
    path: Path, key: str, title: str, again: str, rows: list[dict], text: str, hardware: tuple[str, ...] = ()
) -> None:
    """Puts a section where an older one of that key stands in a results file, or at its end; and its rows beside it.

    again: the command that makes it. rows: its figures, for the JSON file of the same name, in small letters: for each
    key the command, the date, the machine and the rows. hardware: what belongs to the machine beside its CPU.
    """
    date = time.strftime("%Y-%m-%d")
    here = machine(*hardware)
    begin, end = f"<!-- {key} -->", f"<!-- end {key} -->"
    old = path.read_text() if path.exists() else "# Results\n\nWritten by the scripts in this folder; do not edit.\n\n"
    before, _, rest = old.partition(begin)
    after = rest.partition(end)[2].lstrip("\n")
    path.write_text(f"{before}{begin}\n## {title}\n\n`{again}` on {date}: {here}.\n\n{text}\n{end}\n{after}")

    beside = path.with_name(path.stem.lower() + ".json")
    sections = json.loads(beside.read_text()) if beside.exists() else {}
    sections[key] = {"command": again, "date": date, "machine": here, "rows": rows}
    beside.write_text(json.dumps(sections, indent=1) + "\n")
