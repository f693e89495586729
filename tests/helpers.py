"""Small random models of transformers, written as hub folders, and sequences for them."""

from pathlib import Path

import numpy as np
import torch
import transformers

from minift import load
from minift.data.batch import Sequence
from minift.data.check import Report, check_file
from minift.tasks import TASKS

BERT = dict(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=37,
    max_position_embeddings=40,
)
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=0)


def peer(cls: type, folder: Path, seed: int = 0, scale: float = 0.2, **changes):
    """A random model of transformers class `cls` in eval mode, saved in `folder`."""
    torch.manual_seed(seed)
    base, config = (BERT, transformers.BertConfig) if "Bert" in cls.__name__ else (GPT2, transformers.GPT2Config)
    model = cls(config(**base | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_norm = name.endswith("weight") and ("LayerNorm" in name or "ln_" in name)
            p.normal_(float(is_norm), scale)
    model.save_pretrained(folder)
    return model


def sequence(number: int, ids, rows=None, targets=None, types=None) -> Sequence:
    """A Sequence of plain lists; without rows, every token is asked about."""
    rows = np.arange(len(ids)) if rows is None else np.array(rows)
    targets = np.zeros(len(rows)) if targets is None else np.array(targets)
    return Sequence(
        number,
        np.array(ids, np.int32),
        None if types is None else np.array(types, np.int8),
        rows.astype(np.int32),
        targets.astype(np.int64),
    )


def random_ids(lengths: list[int], vocabulary: int = 99, seed: int = 0) -> list[list[int]]:
    """One list of token ids (never 0, which pads) for each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocabulary, n).tolist() for n in lengths]


def small_model(family: str, folder: Path, **changes):
    """A random model and its task."""
    if family == "bert":
        peer(transformers.BertForSequenceClassification, folder, num_labels=3, **changes)
        return load(folder, task="classify")[0], "classify"
    peer(transformers.GPT2LMHeadModel, folder, **changes)
    return load(folder, task="complete")[0], "complete"


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


def small_bert(folder: Path, **changes) -> Path:
    """A random BERT with a vocabulary of a few words, small enough to be trained in a second."""
    peer(transformers.BertModel, folder, scale=0.1, vocab_size=64, hidden_size=32, intermediate_size=64, **changes)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(w for w in letters if w not in WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return folder


def reviews(path: Path, n: int, seed: int = 0) -> Path:
    """A TSV of n short reviews, text and label; the label is whether a praising word is in it."""
    rng = np.random.default_rng(seed)
    praise, blame, rest = WORDS[15:18], WORDS[18:21], WORDS[:15]
    lines = []
    for i in range(n):
        words = rng.choice(rest, rng.integers(2, 12)).tolist()
        words.insert(rng.integers(len(words) + 1), rng.choice(praise if i % 2 else blame))
        lines.append(f"{' '.join(words)}\t{'praise' if i % 2 else 'blame'}\n")
    path.write_text("".join(lines))
    return path


def check(path: Path, task: str = "complete", **options) -> Report:
    """check_file() as `minift check --task` calls it."""
    return check_file(path, TASKS[task].CHECKS, **options)
