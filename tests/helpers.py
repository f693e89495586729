"""What several tests share: command lines run in this process, small random models of transformers written as hub
folders, sequences and data for them, training runs beside transformers'."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from folders import write
from tokenizers.pre_tokenizers import ByteLevel

import minift
from minift.cli import main
from minift.data.batch import Sequence, pack

# ---- command lines


class Said(NamedTuple):
    """The exit code of a command, and what it wrote to standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict]:
        """The lines of standard output, each read as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def last(self) -> dict:
        """The last line of standard output, read as JSON."""
        return json.loads(self.out.splitlines()[-1])


def arguments(line: str, **places) -> list[str]:
    """The arguments of a command line; {name} stands for one of the places, spaces and quotes in it included.

    A training that names no --precision is float32 on every machine, as it is from Python (conftest.py).
    """
    words = [word.format(**places) for word in shlex.split(line)]
    if words and words[0] in ("train", "plan", "trace") and not {"--precision", "--resume", "--config"} & {*words}:
        words[1:1] = ["--precision", "fp32"]
    return words


def cli(line: str, **places) -> Said:
    """Runs `minift LINE` in this process: cli("train --model {folder}/model", folder=tmp_path)."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = main(arguments(line, **places))
        except SystemExit as e:  # bad usage, and --help
            code = e.code
    return Said(code, *(stream.buffer.getvalue().decode() for stream in streams))


def works(line: str, **places) -> Said:
    """Runs `minift LINE`, which must end well."""
    said = cli(line, **places)
    assert said.code == 0, said.err
    return said


def fails(line: str, *words, code: int = 1, **places) -> Said:
    """Runs `minift LINE`, which must end with this code, and with all the words (but no traceback) in what it says."""
    said = cli(line, **places)
    assert said.code == code, said.err
    assert "Traceback" not in said.err and "fault of minift" not in said.err, said.err
    for word in words:
        assert str(word) in said.err, said.err
    return said


def command(line: str, **places) -> list[str]:
    """The same as a command for a process of its own."""
    return [sys.executable, "-m", "minift", *arguments(line, **places)]


def python(code: str, *words, **options) -> str:
    """What a fresh process prints that runs this code, without a fault."""
    line = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(out: Path) -> list[dict]:
    """The steps of a run, as its metrics.jsonl has them."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The training loss of each step of a run."""
    return [step["train/loss"] for step in metrics(out)]


# ---- models

BERT = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
    max_position_embeddings=40,
)  # fmt: skip
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0)


def peer(cls: type, folder: Path, seed: int = 0, scale: float = 0.2, **changes):
    """A random model of transformers class `cls` in eval mode, saved in `folder`."""
    torch.manual_seed(seed)
    config = cls.config_class
    sizes = {"bert": BERT, "gpt2": GPT2}.get(config.model_type, {})
    model = cls(config(**sizes | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = name.endswith("weight") and bool(re.search("LayerNorm|layer_norm|ln_", name))
            p.normal_(float(is_norm), scale)
    model.save_pretrained(folder)
    return model


def randomise(model) -> None:
    """Gives every trained parameter values that show in the outputs, by its size, so that ours and a peer's are one."""
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2


def sequence(number: int, ids, rows=None, targets=None, types=None) -> Sequence:
    """A Sequence of plain lists; without rows, every token is asked about."""
    if rows is None:
        rows = range(len(ids))
    if targets is None:
        targets = [0] * len(rows)
    if types is not None:
        types = np.array(types, np.int8)
    return Sequence(number, np.array(ids, np.int32), types, np.array(rows, np.int32), np.array(targets, np.int64))


def random_ids(lengths: list[int], vocabulary: int = 99, seed: int = 0) -> list[list[int]]:
    """One list of token ids (never 0, which pads) for each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, n).tolist() for n in lengths]


IDS = random_ids([5, 9])


def logits(folder: Path, task: str = "classify", **options) -> torch.Tensor:
    """What a BERT classifier says of the sequences IDS, or a language model after each of their tokens."""
    model, _ = minift.load(folder, task=task, **options)
    rows = [0] if task == "classify" else None
    with torch.no_grad():
        return model.logits(pack([sequence(i, ids, rows) for i, ids in enumerate(IDS)]))


def peer_logits(model, ids: list[list[int]] = IDS) -> torch.Tensor:
    """The same of a model of transformers, which reads one sequence at a time."""
    with torch.no_grad():
        out = [model(input_ids=torch.tensor([x])).logits[0] for x in ids]
    return torch.cat([x if x.dim() == 2 else x[None] for x in out])


def small_model(family: str, folder: Path, width: int = 32):
    """A random model and its task."""
    if family == "bert":
        peer(transformers.BertForSequenceClassification, folder, num_labels=3, hidden_size=width)
        return minift.load(folder, task="classify")[0], "classify"
    peer(transformers.GPT2LMHeadModel, folder, n_embd=width)
    return minift.load(folder, task="complete")[0], "complete"


def examples(task: str, lengths: list[int], first: int = 0) -> list[Sequence]:
    """Random sequences of these lengths for the task of `small_model`, numbered from `first`."""
    rng = np.random.default_rng(first)
    found = []
    for i, ids in enumerate(random_ids(lengths, seed=first)):
        if task == "classify":
            types = [0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) if i % 2 else None
            found.append(sequence(first + i, ids, [0], [int(rng.integers(3))], types))
        else:
            rows = np.flatnonzero(rng.random(len(ids)) < 0.6)
            found.append(sequence(first + i, ids, rows, rng.integers(0, 99, len(rows))))
    return found


WORDS = "the a film plot acting music was is very quite and but of in it good great fine bad poor dull not so".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def small_bert(folder: Path, **changes) -> Path:
    """A random BERT with a vocabulary of a few words, small enough to be trained in a second."""
    peer(transformers.BertModel, folder, scale=0.1, vocab_size=64, hidden_size=32, intermediate_size=64, **changes)
    letters = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in WORDS]
    write(folder / "vocab.txt", *VOCABULARY, *letters)
    return folder


EOS, ENDS = 256, "<|endoftext|>"  # of small_gpt2


def small_gpt2(folder: Path, cls: type = transformers.GPT2LMHeadModel, more: tuple = (), merges: tuple = (), **changes):
    """A random GPT-2 whose tokens are single bytes, end-of-text, and `more`, which are made by `merges`."""
    options = dict(vocab_size=257, n_positions=100, bos_token_id=EOS, eos_token_id=EOS) | changes
    model = peer(cls, folder, **options)
    tokens = [*sorted(ByteLevel.alphabet()), ENDS, *more]
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write(folder / "merges.txt", "#version: 0.2", *merges)
    return model


def real_gpt2(folder: Path, assets: Path, cls: type = transformers.GPT2LMHeadModel, **changes) -> Path:
    """A random GPT-2 with the real vocab.json and merges.txt, as old folders have them."""
    peer(cls, folder, vocab_size=50257, **changes)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(assets / "weights/tokenizers/gpt2" / name, folder)
    return folder


def reviews(path: Path, n: int, seed: int = 0) -> Path:
    """A TSV of n short reviews, text and label; the label is whether a praising word is in it."""
    rng = np.random.default_rng(seed)
    praise, blame, rest = WORDS[15:18], WORDS[18:21], WORDS[:15]
    rows = []
    for i in range(n):
        label, judgement = ("praise", praise) if i % 2 else ("blame", blame)
        words = rng.choice(rest, rng.integers(2, 12)).tolist()
        words.insert(rng.integers(len(words) + 1), rng.choice(judgement))
        rows.append((" ".join(words), label))
    return write(path, *rows)


def model_and_data(folder: Path, train: int, valid: int = 0) -> Path:
    """A folder with a small BERT in model/, and reviews in train.tsv and, where some are wanted, in valid.tsv."""
    small_bert(folder / "model")
    reviews(folder / "train.tsv", train)
    if valid:
        reviews(folder / "valid.tsv", valid, seed=1)
    return folder


def nf4(**more) -> transformers.BitsAndBytesConfig:
    """Four bits as ours are, for transformers' models: the heads and the pooler stay in float."""
    skipped = ["classifier", "bert.pooler.dense", "lm_head"]
    kinds = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return transformers.BitsAndBytesConfig(**kinds, llm_int8_skip_modules=skipped, **more)


# ---- training


def train(model, tokenizer, data: Path, out: Path, /, **options):
    """Trains from Python, into a run folder; what minift.train returns."""
    return minift.train(model, tokenizer, minift.TrainConfig(data=str(data), out=str(out), **options))


def trainer_log(model, examples: list[dict], collator, out: Path, trainer: type | None = None, **options) -> list[dict]:
    """What transformers' Trainer (or a class like it) logs of each of twenty steps of eight examples."""
    options = dict(per_device_train_batch_size=8, max_steps=20, learning_rate=5e-5, seed=42) | options
    quiet = dict(logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
    arguments = transformers.TrainingArguments(output_dir=out, **options, **quiet)
    trainer = trainer or transformers.Trainer
    run = trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]
