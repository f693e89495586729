"""One flat dataclass per command; its help stands beside each option, and the command line is derived from it.

A field `max_length: int = option(0, "...")` is the option `--max-length N` and the key "max_length" in a JSON file.
A command's help begins with the docstring of its class, of which `minift --help` shows the first line; its examples
are a paragraph of lines that begin with `minift`.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .tables import BASES, FAMILIES, METHODS, OPTIMIZERS, SCHEDULES, TASKS, method_named

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
KERNELS = ("auto", "native", "reference")
LONGEST = 4 << 20  # bytes of a line: about a million tokens, a thousand contexts of GPT-2, 100 MB while tokenised

PATHS = {"model", "base_model", "data", "valid", "out", "chrome", "trace"}  # options that may name files
FEW = 1000  # names in a folder that are looked at for what was meant
LARGEST = 2**63 - 1  # of a whole number: what torch's seeds and counters hold

# what other tools call an option, or a value of one, and what it is called here
OTHER_NAMES = {
    "--learning-rate": "--lr",
    "--batch-size": "--batch",
    "--per-device-train-batch-size": "--batch",
    "--num-train-epochs": "--epochs",
    "--max-steps": "--steps",
    "--model-name-or-path": "--model",
    "--output-dir": "--out",
    "--train-file": "--data",
    "--validation-file": "--valid",
    "--max-seq-length": "--max-length",
    "--max-new-tokens": "--max-tokens",
    "--warmup-steps": "--warmup",
    "--warmup-ratio": "--warmup",
    "--lr-scheduler-type": "--schedule",
    "--max-grad-norm": "--clip",
    "--optim": "--optimizer",
    "--adam-beta1": "--beta1",
    "--adam-beta2": "--beta2",
    "--adam-epsilon": "--eps",
    "--momentum": "--beta1",
    "--gradient-checkpointing": "--recompute",
    "--lora-r": "--rank",
    "--lora-alpha": "--alpha",
    "--lora-dropout": "--adapter-dropout",
    "--target-modules": "--targets",
    "--report-to": "--log",
    "--fp16": "--precision fp16",
    "--bf16": "--precision bf16",
    "--load-in-4bit": "--base nf4",
    "--load-in-8bit": "--base int8",
    "adam": "adamw",
    "adamw-torch": "adamw",
    "adamw-torch-fused": "adamw",
    "classification": "classify",
    "text-classification": "classify",
    "sequence-classification": "classify",
    "completion": "complete",
    "generation": "complete",
    "text-generation": "complete",
    "causal-lm": "complete",
    "clm": "complete",
    "qlora": "lora with --base nf4",
    "finetune": "full",
    "freeze": "head",
    "bitfit": "bias",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "gpu": "cuda",
    "4bit": "nf4",
    "int4": "nf4",
    "8bit": "int8",
}


def meant(found: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for a name that is not among the known ones, or "" where nothing is near."""
    other = OTHER_NAMES.get(found.lower().replace("_", "-"))
    if other is not None and other.split()[0] in known:
        return f"; did you mean {other}?"
    near = difflib.get_close_matches(found.lower(), list(known), 1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def meant_path(given: str | Path, accepted: Callable[[Path], bool]) -> str:
    """The path that is there and accepted, and whose names are like those of `given`, which is not; "" for none."""
    parts = Path(given).parts
    place = Path()
    for i, part in enumerate(parts):
        if (place / part).exists():
            place = place / part
            continue
        try:
            names = os.listdir(place)
        except OSError:
            return ""
        if i == len(parts) - 1:
            names = [name for name in names[:FEW] if accepted(place / name)]
        near = difflib.get_close_matches(part, names[:FEW], 1, cutoff=0.6)  # two letters of three
        if not near:
            return ""
        place = place / near[0]
    return str(place) if accepted(place) else ""


def refused(flag: str, value: str, accepted: Sequence[str]) -> str:
    """What is said of a value that an option does not take."""
    return f"{flag} is {value!r}; expected one of {', '.join(accepted)}{meant(value, accepted)}"


def is_number(text: str) -> bool:
    """Whether a text is read as a number: inf and nan too."""
    try:
        float(text)
    except ValueError:
        return False
    return True


SIZES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def size_of(text: str) -> int:
    """Bytes of a size such as 2GB, 900MB or 1.5GiB. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]i?b)", text.strip().lower())
    if not found:
        raise ValueError(f"--fit is {text!r}; expected a size, as 2GB, 900MB or 1.5GiB")
    return round(float(found[1]) * SIZES[found[2]])


def numbers_of(text: str) -> set[int]:
    """The numbers of a list such as 17,203,5-9. Raises ValueError."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, dash, last = part.strip().partition("-")
        if not dash:
            last = first
        if not (re.fullmatch(r"[0-9]{1,9}", first) and re.fullmatch(r"[0-9]{1,9}", last) and int(first) <= int(last)):
            raise ValueError(f"--without is {text!r}; expected numbers of examples, as 17,203 or 5-9")
        found.update(range(int(first), int(last) + 1))
    return found


def option(default, help: str, choices: tuple = (), at_least=None, heading: str = ""):
    """A dataclass field that is also a command-line option.

    heading: where `--help` begins a new group of options with this one.
    """
    metadata = {"help": help, "choices": choices, "at_least": at_least, "heading": heading}
    return field(default=default, metadata=metadata)


def positional(metavar: str, help: str):
    """A dataclass field of one word or several that stand behind the command, without a flag."""
    metadata = {"help": help, "choices": (), "at_least": None, "heading": "", "positional": metavar}
    return field(default_factory=list, metadata=metadata)


def choice(default: str, help: str, table: dict[str, str]):
    """An option that takes a name from a table of tables.py; its help lists them."""
    listed = "; ".join(f"{name}: {what}" for name, what in table.items())
    return option(default, f"{help}; {listed}", choices=tuple(table))


HEADER = {
    "default": "auto",
    "help": "whether a .csv or .tsv begins with a header; auto: by its names",
    "choices": ("auto", "yes", "no"),
}
MAX_LINE = {"default": LONGEST, "help": "longest line of a data file in bytes; 0: no limit", "at_least": 0}


METHOD_HELP = "; ".join(f"{name}: {method.help}" for name, method in METHODS.items())


@dataclass
class Config:
    """What every command's options share: checking, and JSON in and out."""

    def check(self) -> None:
        """Raises ValueError that names the option, its value and the values accepted."""
        for f in dataclasses.fields(self):
            value, flag = getattr(self, f.name), "--" + f.name.replace("_", "-")
            if f.type is float and type(value) is int:
                setattr(self, f.name, value := float(value))
            if type(value) is not f.type:
                raise ValueError(f"{flag} is {value!r}; expected {f.type.__name__}")
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ValueError(refused(flag, value, f.metadata["choices"]))
            if f.type is float and not math.isfinite(value):
                raise ValueError(f"{flag} is {value!r}; expected a finite number")
            if f.type is int and abs(value) > LARGEST:
                raise ValueError(f"{flag} is {value!r}; expected at most {LARGEST}")
            low = f.metadata["at_least"]
            if low is not None and value < low:
                raise ValueError(f"{flag} is {value!r}; expected at least {low}")

    def to_json(self) -> str:
        """The content of the JSON file that `--config` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass
class TrainConfig(Config):
    """Fine-tune a model on a file of examples.

    minift train --data reviews.csv --valid 0.1 --out runs/a
    minift train --model gpt2 --task complete --data facts.jsonl --method lora --out runs/b
    """

    model: str = option("", "folder, hub id, or builtin:NAME; none: a small one that ships with minift")
    init: str = option(
        "pretrained",
        "weights at the start; random: drawn from --seed, --model needs a config.json and a tokenizer alone",
        choices=("pretrained", "random"),
    )
    task: str = choice("classify", "what is learned", TASKS)
    data: str = option(
        "", "training file: .jsonl .csv .tsv (each also .gz), or a folder per class (required)", heading="data"
    )
    valid: str = option("", "validation file, or the fraction of the training examples to hold out, as 0.1")
    columns: str = option("", "columns or keys to read, as text,label or text=sentence1,pair=sentence2,label=label")
    header: str = option(**HEADER)
    max_line: int = option(**MAX_LINE)
    labels: str = option("", "names of the classes in the order of their numbers, as negative,positive")
    limit: int = option(0, "train on N examples drawn at random; 0: all", at_least=0)
    without: str = option("", "examples to leave out, counted from 0, as 17,203 or 5-9; all others keep their order")
    max_length: int = option(
        0, "longest sequence in tokens, the rest is cut; 0: 512 or the model's own limit", at_least=0
    )
    method: str = option("full", METHOD_HELP, heading="what is trained")
    rank: int = option(8, "of an adapter's two matrices", at_least=1)
    alpha: float = option(32.0, "an adapter's update is scaled by alpha / rank", at_least=0)
    adapter_dropout: float = option(0.1, "rate of dropout on an adapter's input", at_least=0)
    targets: str = option(
        "", "layers to adapt: query,value or all-linear or a regular expression; none: PEFT's default"
    )
    exclude: str = option("", "layers not to adapt, named the same way")
    layers: str = option("", "numbers of the transformer layers to adapt, as 0,1,5; none: all")
    rank_pattern: str = option("", "other ranks for some layers, as c_proj=4,layer.0.*=16 (regular expressions)")
    alpha_pattern: str = option("", "other alphas for some layers, the same way")
    rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    lora_plus: float = option(
        1.0, "learning rate of an adapter's B as a multiple of A's (LoRA+ advises 16)", at_least=0
    )
    base: str = option(
        "auto", "how frozen weights are kept; auto: as activations", choices=("auto", "fp32", "bf16", *BASES)
    )
    epochs: int = option(3, "passes over the data", at_least=1, heading="steps")
    steps: int = option(0, "stop after N optimizer steps; 0: after the epochs", at_least=0)
    batch: int = option(8, "sequences an optimizer step", at_least=1)
    optimizer: str = choice("adamw", "how gradients update weights", OPTIMIZERS)
    beta1: float = option(-1.0, "decay rate of the gradients' running mean, 0 to 1; -1: the optimizer's own")
    beta2: float = option(-1.0, "a second decay rate, where the optimizer has one; -1: the optimizer's own")
    eps: float = option(-1.0, "keeps the optimizer from dividing by 0, where it divides; -1: the optimizer's own")
    lr: float = option(
        0.0,
        "learning rate at its peak; 0: 5e-5 where all is trained, 1e-3 for a part, for adapters 5e-4 or their own, "
        "times what --optimizer says",
        at_least=0,
    )
    warmup: float = option(0.0, "steps of linear warm-up, or below 1 the fraction of all steps", at_least=0)
    schedule: str = choice("linear", "learning rate after the warm-up", SCHEDULES)
    weight_decay: float = option(0.0, "the optimizer's decay; not for biases and layer norms", at_least=0)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", at_least=0)
    dropout: float = option(
        -1.0, "one rate for every dropout of the model; -1: the rates of its config.json", at_least=-1
    )
    label_smoothing: float = option(0.0, "share of each target's weight that is spread over all classes", at_least=0)
    seed: int = option(42, "fixes order, dropout and fresh weights", at_least=0)
    tokens: int = option(
        0,
        "most tokens in memory at once; a step is split to fit; 0: no limit; for adapters on a CPU 512 or more",
        at_least=0,
        heading="speed and memory",
    )
    fit: str = option("", "memory that the run may take, as 2GB: chooses --tokens, --recompute and --base")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "dtype of activations; auto: what the hardware is fast at", choices=PRECISIONS)
    kernels: str = option("auto", "fused operators; auto: compiled where a C++ compiler is found", choices=KERNELS)
    graph: bool = option(False, "CUDA, bf16: record steps as graphs and replay them, for what is slow to launch")
    recompute: bool = option(False, "save only the input of each layer, and compute it again in backward")
    shard: bool = option(False, "with torchrun: split weights, gradients and moments over the processes")
    out: str = option("", "run folder, new or empty (required)", heading="run")
    eval_every: str = option("epoch", "validate after each epoch, or every N steps")
    save_every: str = option("epoch", "write a checkpoint after each epoch, or every N steps")
    keep: int = option(2, "checkpoints kept, the newest", at_least=1)
    patience: int = option(0, "stop after N validations without a better one; 0: never", at_least=0)
    log: str = option("", "also log to tensorboard, wandb, or both: tensorboard,wandb")
    resume: bool = option(False, "go on with the run in --out after its latest checkpoint")

    def check(self) -> None:
        super().check()
        self.check_method()
        self.check_numbers()
        self.check_step()
        for flag, value in (("--eval-every", self.eval_every), ("--save-every", self.save_every)):
            if value != "epoch" and not (value.isdigit() and int(value) > 0):
                raise ValueError(f"{flag} is {value!r}; expected epoch or a number of steps")
        for name in filter(None, self.log.split(",")):
            if name not in ("tensorboard", "wandb"):
                raise ValueError(f"--log is {self.log!r}; expected tensorboard, wandb, or both with a comma between")
        if is_number(self.valid) and not 0 < float(self.valid) < 1:  # nan is not above 0
            raise ValueError(f"--valid is {self.valid!r}; expected a file, or a fraction above 0 and below 1")
        if self.fit:
            size_of(self.fit)
        numbers_of(self.without)
        if self.patience and not self.valid:
            raise ValueError(f"--patience is {self.patience} without --valid; expected one, to tell what is better")

    def check_method(self) -> None:
        """--method, and the base that it needs."""
        method = method_named(self.method)
        if method is None:
            raise ValueError(refused("--method", self.method, tuple(METHODS)))
        bits = BASES.get(self.base)
        if bits and method.base == "unpacked":
            raise ValueError(
                f"--base is {self.base!r} with --method {self.method}; weights in {bits} do not learn, expected lora..."
            )
        if self.base != "nf4" and method.base == "packed":
            raise ValueError(
                f"--method is {self.method!r} with --base {self.base}; it makes up for 4 bits, expected --base nf4"
            )
        if self.init == "random" and bits:
            raise ValueError(f"--init is 'random' with --base {self.base}; weights in {bits} do not learn")

    def check_numbers(self) -> None:
        """What a number may be, beyond its option's own `at_least`."""
        if not self.adapter_dropout < 1:
            raise ValueError(f"--adapter-dropout is {self.adapter_dropout!r}; expected at least 0 and below 1")
        if not re.fullmatch(r"(\d+(,\d+)*)?", self.layers):
            raise ValueError(f"--layers is {self.layers!r}; expected numbers with commas between")
        for flag, text in (("--rank-pattern", self.rank_pattern), ("--alpha-pattern", self.alpha_pattern)):
            if not re.fullmatch(r"([^=,]+=\d+(,[^=,]+=\d+)*)?", text):
                raise ValueError(f"{flag} is {text!r}; expected NAME=NUMBER, with commas between")
        if not self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing is {self.label_smoothing!r}; expected at least 0 and below 1")
        for flag, value in (("--dropout", self.dropout), ("--beta1", self.beta1), ("--beta2", self.beta2)):
            if value != -1 and not 0 <= value < 1:
                raise ValueError(f"{flag} is {value!r}; expected -1, or at least 0 and below 1")
        if self.eps != -1 and self.eps < 0:
            raise ValueError(f"--eps is {self.eps!r}; expected -1, or at least 0")

    def check_step(self) -> None:
        """What a step cannot be all at once."""
        if self.graph and self.precision not in ("auto", "bf16"):
            raise ValueError(f"--graph is True with --precision {self.precision}; expected bf16 or auto")
        if self.graph and (self.shard or self.recompute):
            raise ValueError(
                f"--graph is True with --{'shard' if self.shard else 'recompute'}; expected one of the two"
            )
        if self.shard and self.precision == "fp16":
            raise ValueError("--shard is True with --precision fp16; expected fp32 or bf16")


@dataclass
class PlanConfig(TrainConfig):
    """Say what a run would take, before it does.

    The options are those of `minift train`; nothing is trained, and nothing written.

    minift plan --model bert-base-uncased --data reviews.csv
    minift plan --model gpt2 --task complete --data facts.jsonl --method lora --base nf4
    """

    out: str = option("", "not looked at: nothing is written", heading="run")
    json: bool = option(False, "one JSON object as the last line of standard output", heading="results")


@dataclass
class TraceConfig(TrainConfig):
    """Show where the time and memory of a step go.

    The options are those of `minift train`, whose first step is taken and explained. Of the run nothing is written.

    minift trace --model bert-base-uncased --data reviews.csv
    minift trace --model gpt2 --task complete --data facts.jsonl --method lora --verify --out step.json
    """

    out: str = option("", "write the whole tree here, as JSON", heading="trace")
    chrome: str = option("", "write the step as a trace for chrome://tracing and ui.perfetto.dev here")
    overwrite: bool = option(False, "replace the files in --out and --chrome if they are there")
    unfold: str = option("", "levels of the tree to print, or all; none: what costs most, in one screen")
    verify: bool = option(False, "compare each call of a kernel with its PyTorch reference in float64")

    def check(self) -> None:
        super().check()
        if self.unfold not in ("", "all") and not (self.unfold.isdigit() and int(self.unfold) > 0):
            raise ValueError(f"--unfold is {self.unfold!r}; expected a number of levels, or all")


@dataclass
class DemoConfig(Config):
    """Fine-tune built-in models on built-in data.

    What they learned is shown. It takes no network and about a minute.

    minift demo
    """

    out: str = option("minift-demo", "folder for data, runs and logs, new or empty", heading="run")


@dataclass
class NewConfig(Config):
    """Make a model folder from text.

    A tokenizer learned from the text and a config.json, to be trained by `minift train --init random`.

    minift new --data corpus.txt --out my-bert
    """

    data: str = option(
        "", "text to learn the tokenizer from: .txt of running text, or .jsonl .csv .tsv (required)", heading="data"
    )
    columns: str = option("", "column or key of the text, as text=review")
    header: str = option(**HEADER)
    max_line: int = option(**MAX_LINE)
    out: str = option("", "folder for the model (required)", heading="model")
    family: str = option("bert", "kind of model", choices=tuple(FAMILIES))
    vocab: int = option(8192, "tokens of the vocabulary, at most; 257 of gpt2 are bytes alone", at_least=1)
    lowercase: bool = option(False, "of word pieces (bert, distilbert): read capitals as small letters")
    width: int = option(256, "numbers that stand for a token in each layer", at_least=1)
    layers: int = option(4, "transformer layers", at_least=1)
    heads: int = option(4, "attention heads of a layer", at_least=1)
    positions: int = option(512, "longest sequence in tokens", at_least=1)


@dataclass
class EvalConfig(Config):
    """Measure a fine-tuned model on labelled examples.

    minift eval --model runs/a --data test.csv
    """

    model: str = option("", "run folder, or model folder or hub id with a trained head (required)")
    base_model: str = option("", "of an adapter whose base has moved: folder or hub id of the model that it adapts")
    task: str = option("classify", "what it was trained for", choices=tuple(TASKS))
    data: str = option("", "labelled file or folder (required)", heading="data")
    columns: str = option("", "columns or keys to read, as text,label")
    header: str = option(**HEADER)
    max_line: int = option(**MAX_LINE)
    limit: int = option(0, "evaluate N examples drawn at random; 0: all", at_least=0)
    seed: int = option(42, "fixes the draw of --limit", at_least=0)
    max_length: int = option(
        0, "longest sequence in tokens; 0: as in training, else 512 or the model's limit", at_least=0
    )
    tokens: int = option(4096, "tokens in memory at once", at_least=1, heading="speed and memory")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    json: bool = option(False, "one JSON object as the last line of standard output", heading="results")


@dataclass
class PredictConfig(Config):
    """Label new texts.

    The results are JSON objects, one a line, in the order of the input.

      minift predict --model runs/a --text "what a lovely evening"
      minift predict --model runs/a --data new.csv --out labels.jsonl
    """

    model: str = option("", "run folder, or model folder or hub id with a trained head (required)")
    base_model: str = option("", "of an adapter whose base has moved: folder or hub id of the model that it adapts")
    task: str = option("classify", "what it was trained for", choices=tuple(TASKS))
    text: str = option("", "one text instead of a file", heading="texts")
    pair: str = option("", "the second sentence of --text")
    data: str = option("", "file of texts (a label, if there, is not looked at)")
    columns: str = option("", "columns or keys to read, as text or text=review")
    header: str = option(**HEADER)
    max_line: int = option(**MAX_LINE)
    max_length: int = option(
        0, "longest sequence in tokens; 0: as in training, else 512 or the model's limit", at_least=0
    )
    tokens: int = option(4096, "tokens in memory at once", at_least=1, heading="speed and memory")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    out: str = option("", "write here instead of standard output", heading="results")
    overwrite: bool = option(False, "replace the file in --out if it is there")

    def check(self) -> None:
        super().check()
        if bool(self.data) == bool(self.text):
            raise ValueError('give either --data FILE or --text "..."')


@dataclass
class GenerateConfig(Config):
    """Complete prompts.

    The results are JSON objects {"prompt", "completion"}, one a line, in the order of the input.

      minift generate --model runs/b --prompt "The capital of Peru is"
      minift generate --model runs/b --data prompts.jsonl --out completions.jsonl
    """

    model: str = option("", "run folder, or model folder or hub id of a language model (required)")
    base_model: str = option("", "of an adapter whose base has moved: folder or hub id of the model that it adapts")
    prompt: str = option("", "one prompt", heading="prompts")
    data: str = option("", "file of prompts: .jsonl with prompt or messages")
    max_line: int = option(**MAX_LINE)
    max_tokens: int = option(64, "most tokens to generate for a prompt", at_least=1, heading="what is generated")
    temperature: float = option(0.0, "divides the logits; 0: always the likeliest token", at_least=0)
    top_k: int = option(0, "draw from the K likeliest tokens; 0: from all", at_least=0)
    top_p: float = option(1.0, "draw from the fewest tokens that have this share of the probability", at_least=0)
    seed: int = option(0, "fixes what is drawn", at_least=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), heading="speed and memory")
    out: str = option("", "write here instead of standard output", heading="results")
    overwrite: bool = option(False, "replace the file in --out if it is there")

    def check(self) -> None:
        super().check()
        if bool(self.data) == bool(self.prompt):
            raise ValueError('give either --prompt "..." or --data FILE')
        if self.top_p > 1:
            raise ValueError(f"--top-p is {self.top_p!r}; expected 0 to 1")


@dataclass
class CheckConfig(Config):
    """Look for faults in a training file.

    The file is judged as a fine-tuning service would: every fault with its line, then counts and warnings.

      minift check --data facts.jsonl --model gpt2
      minift check --data reviews.csv --task classify
    """

    data: str = option("", "training file (required)", heading="data")
    task: str = option("complete", "what it is for", choices=tuple(TASKS))
    valid: str = option("", "validation file, for leakage between the two")
    columns: str = option("", "columns or keys to read, as text,label (classify)")
    header: str = option(**HEADER)
    max_line: int = option(**MAX_LINE)
    model: str = option("", "folder or hub id whose tokenizer counts tokens", heading="tokens")
    max_length: int = option(0, "longest sequence in tokens, the rest would be cut; 0: no limit", at_least=0)
    epochs: int = option(3, "passes over the data, for the estimate of tokens trained", at_least=1)


@dataclass
class MergeConfig(Config):
    """Make one model of a base and its adapter.

    What it costs is printed, per layer and on the logits of a sample.

      minift merge --model runs/b --out merged
    """

    model: str = option("", "run folder or adapter folder (required)")
    base_model: str = option("", "of an adapter whose base has moved: folder or hub id of the model that it adapts")
    out: str = option("", "folder for the merged model (required)", heading="the merged model")
    into: str = option(
        "dequantized",
        "of a packed base: the weights before packing, what the bits say (keeps what was trained), or packed again",
        choices=("original", "dequantized", *BASES),
    )
    data: str = option("", "file of examples to compare the logits on; none: random tokens", heading="examples")
    columns: str = option("", "its columns or keys, as text,label")
    header: str = option(**HEADER)
    max_line: int = option(**MAX_LINE)


@dataclass
class InspectConfig(Config):
    """Show what a model is made of and has learned.

    Every tensor with its shape, dtype, bytes, and whether it is trained; of an adapter or a run, the rank and size of
    what it learned.

      minift inspect --model runs/b
    """

    model: str = option("", "run folder, model folder or hub id (required)")
    base_model: str = option("", "of an adapter whose base has moved: folder or hub id of the model that it adapts")


@dataclass
class DiffConfig(Config):
    """Show how two runs differ.

    Layer by layer in their weights and, with --data, in what they say of the lines of a file. A run and the same run
    --without some examples show what these taught.

    minift diff runs/a runs/b --data test.csv
    """

    runs: list = positional("RUN", "two run folders, models or adapters (required)")
    task: str = choice("classify", "what they are for", TASKS)
    data: str = option("", "file of labelled examples to ask both about", heading="data")
    columns: str = option("", "columns or keys to read, as text,label or text=sentence1,pair=sentence2,label=label")
    header: str = option(**HEADER)
    max_length: int = option(0, "longest sequence in tokens; 0: as in training", at_least=0)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"), heading="speed and memory")


@dataclass
class ReportConfig(Config):
    """Write what runs did as one HTML page.

    Curves of one run or several, speed, memory, what each layer learned, examples before and after, and those that were
    hardest to learn. It opens without a network; pictures take the extra `plots`.

      minift report runs/a --out report.html
      minift report runs/a runs/b --trace step.json --out report.html
    """

    runs: list = positional("RUN", "run folder, one or several (required)")
    base_model: str = option("", "of an adapter whose base has moved: folder or hub id of the model that it adapts")
    trace: str = option(
        "", "a step as `minift trace --out FILE.json` wrote it, for a flame graph", heading="what is shown"
    )
    examples: int = option(6, "examples that the models before and after are asked about; 0: none", at_least=0)
    out: str = option("", "file for the page (required)", heading="results")
    overwrite: bool = option(False, "replace the file in --out if it is there")


NESTED = 100  # levels of a JSON file; a model's or a tokenizer's has about ten


def parse_json(content: str | bytes, path: str | Path):
    """What a JSON file says. Raises InputError that names `path`, also where it is nested so deep that readers fail."""
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        if text.count("[") + text.count("{") > NESTED and depth(text) > NESTED:
            raise ValueError(f"nested more than {NESTED} levels deep")
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: not JSON ({e})") from e


def depth(text: str) -> int:
    """How many brackets and braces of a JSON text are open at once, at most."""
    deepest = level = 0
    for sign in re.findall(r"[\[{}\]]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        level += 1 if sign in "[{" else -1
        deepest = max(deepest, level)
    return deepest


def add_options(parser: argparse.ArgumentParser, cls: type[Config]) -> None:
    """One `--option` per field. Defaults are left out, so that only what was typed overrides `--config FILE`."""
    group = parser.add_argument_group("model")
    for f in dataclasses.fields(cls):
        if f.metadata["heading"]:
            group = parser.add_argument_group(f.metadata["heading"])
        if "positional" in f.metadata:
            group.add_argument(
                f.name, nargs="*", metavar=f.metadata["positional"], default=argparse.SUPPRESS, help=f.metadata["help"]
            )
            continue
        # the value's own check says more than argparse's: Config.check knows what is accepted
        if f.type is bool:
            how: dict[str, Any] = {"action": "store_true"}
        else:
            read = {str: str, int: whole_number, float: number}[f.type]
            metavar = {str: "X", int: "N", float: "R"}[f.type]
            how = {"type": read, "metavar": "PATH" if f.name in PATHS else metavar}
        help = f.metadata["help"]
        if f.metadata["choices"]:
            how["metavar"] = "{" + ",".join(f.metadata["choices"]) + "}"
        if f.default != "" and f.default is not False:
            help += f" (default {f.default})"
        help = help.replace("%", "%%")  # argparse's own sign
        group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=help, **how)
    group = parser.add_argument_group("other")
    group.add_argument("--config", metavar="FILE", help="JSON file with any of these options; the command line wins")
    group.add_argument("-h", "--help", action="help", help="show this and end")


def whole_number(text: str) -> int:
    """The value of an option that counts. Raises argparse's error for any other text."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number") from None


def number(text: str) -> float:
    """The value of an option that is a number. Raises argparse's error for any other text."""
    if not is_number(text):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number")
    return float(text)


def from_args(cls: type[Config], args: argparse.Namespace) -> Config:
    """The checked configuration: defaults, then `--config FILE`, then the command line.

    With --resume the options are those of the run in --out.
    Raises InputError for an unreadable file, ValueError for a wrong value.
    """
    typed = {f.name: getattr(args, f.name) for f in dataclasses.fields(cls) if hasattr(args, f.name)}
    for name in PATHS & typed.keys():
        if typed[name].startswith("~/"):  # a shell leaves it as it is in --out=~/runs
            typed[name] = os.path.expanduser(typed[name])
    path = Path(typed.get("out", ""), "config.json") if typed.get("resume") else args.config
    base = read_json(cls, Path(path)) if path else {}
    if typed.get("resume"):  # the run goes on as it began
        for name in typed.keys() - {"resume", "out"}:
            if typed[name] != base.get(name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is {typed[name]!r}; the run in --out began with {base.get(name)!r}")
    config = cls(**base | typed)
    config.check()
    for f in dataclasses.fields(cls):
        if f.metadata["help"].endswith("(required)") and not getattr(config, f.name):
            raise ValueError(f"{f.metadata.get('positional', '--' + f.name)} is missing")
    return config


def read_json(cls: type[Config], path: Path) -> dict:
    """The options in a JSON file, as config.json of a run folder. Raises InputError for anything that is no option."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e})") from e
    values = parse_json(content, path)
    names = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) - names:
        found = sorted(set(values) - names) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{path}: found {found}; expected an object with some of {sorted(names)}")
    return values
