"""The next token: GPT-2 learns to complete prompts, to answer in a chat, or to go on with plain text.

Prompt and completion are tokenised apart and joined, so the boundary between them never moves; each completion ends
with the end-of-text token. Special tokens that the tokenizer puts in front of a text stand once, at the start of all.
Only completion tokens are trained on: rows are the positions before each of them.

M rows, V vocabulary. What each name below is for: tasks/__init__.py.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from types import ModuleType

import numpy as np
import torch
from torch import nn

from ..data import corpus
from ..data.batch import Batch, Sequence
from ..data.check_dialogues import CHECKS as CHECKS
from ..data.corpus import Blocks, Piece
from ..data.passages import Passage, passages_from, stream_passages
from ..data.tokenizer import BATCH, Tokenizer
from ..errors import InputError
from ..models import Model
from ..ops.dropout import SILENT
from .classify import loss as loss

NAMED_CLASSES = False
PEFT_TYPE = "CAUSAL_LM"
PEFT_HEADS = ()
COUNTED = "accuracy"


stream = stream_passages
from_rows = passages_from
predictions = None  # `minift generate` completes


# the head, and what checkpoints say of it


def architecture(family: ModuleType) -> str | None:
    """What transformers calls a family with this head."""
    head = family.HEADS.get("vocabulary")
    return head.architecture if head else None


def make_head(family: ModuleType, config, n_labels: int) -> nn.Module:
    """The family's head for the next token."""
    return family.HEADS["vocabulary"](config, n_labels)


def settings(model: Model) -> dict:
    """Nothing beside the checkpoint's own."""
    return {}


def label_names(examples: list[Passage], given: str = "") -> None:
    """There are no classes."""


# examples -> sequences


def judge(passages: Iterable[Passage], model: Model, tokenizer: Tokenizer, labelled: bool = True) -> list[int]:
    """A 0 for each passage, all of them read and nothing of them kept."""
    return [0 for _ in passages]


def encode(
    passages: list[Passage] | list[Piece],
    model: Model,
    tokenizer: Tokenizer,
    max_length: int,
    labelled: bool = True,
) -> list[Sequence] | Blocks:
    """Tokens, and the rows and targets of the parts to be learned. Raises InputError where nothing is to be learned."""
    if corpus.is_running(passages):
        end_of_text(model, tokenizer)  # eval and generate cannot do without
        found = corpus.blocks(passages, tokenizer, max_length + 1, 1, make_blocks, tokenizer.before)
        if not found:
            raise InputError(f"{passages[0].text.name}: nothing to learn from; expected two tokens or more")
        return found
    return list(encoded(passages, (), model, tokenizer, max_length))


def encoded(
    passages: Iterable[Passage], labels: Iterable[int], model: Model, tokenizer: Tokenizer, max_length: int
) -> Iterator[Sequence]:
    """The same one at a time, BATCH passages read ahead; running text is cut at the same places."""
    number, learnable, where, stream = 0, False, "", []
    for passage, ids, learned in tokens_of(passages, model, tokenizer):
        where = where or passage.where
        if passage.plain:
            stream = (stream or list(tokenizer.before)) + ids
            ready = (len(stream) - 1) // max_length * max_length  # whole blocks; each asks for one token more
            found, stream = blocks(number, stream[: ready + 1], max_length), stream[ready:]
        else:
            found = [masked(number, ids, learned, max_length)]
        yield from found
        number += len(found)
        learnable = learnable or any(len(s.targets) for s in found)
    rest = blocks(number, stream, max_length)
    yield from rest
    if not learnable and not any(len(s.targets) for s in rest):
        raise InputError(f"{where}: nothing to learn from; every completion is cut off at {max_length} tokens")


def tokens_of(
    passages: Iterable[Passage], model: Model, tokenizer: Tokenizer
) -> Iterator[tuple[Passage, list[int], list[bool]]]:
    """(passage, its tokens, whether each is learned): parts tokenised apart, an end-of-text after each learned one.

    What the tokenizer puts in front of a text stands once, before the first part (of running text: see `encoded`).
    A text in which a special token is spelt out, as <|endoftext|>, holds that token, as in transformers.
    """
    stop, passages = end_of_text(model, tokenizer), iter(passages)
    while some := list(islice(passages, BATCH)):
        texts = [text for passage in some for text, _ in passage.parts]
        tokens = iter(tokenizer.encode(texts, special=False))
        for passage in some:
            ids = [] if passage.plain else list(tokenizer.before)
            learned = [False] * len(ids)
            for _, learn in passage.parts:
                part = next(tokens).ids
                if learn and not passage.plain and part[-1:] != [stop]:  # the data may have written it itself
                    part = [*part, stop]
                ids += part
                learned += [learn] * len(part)
            yield passage, ids, learned


def masked(number: int, ids: list[int], learned: list[bool], max_length: int) -> Sequence:
    """A sequence that is asked for its learned tokens; the first token of all cannot be asked for."""
    kept = np.array(ids[:max_length], np.int32)
    rows = np.flatnonzero(learned[1 : len(kept)]).astype(np.int32)
    return Sequence(number, kept, None, rows, kept[rows + 1].astype(np.int64), cut=len(ids) > max_length)


def blocks(number: int, stream: list[int], length: int) -> list[Sequence]:
    """Plain text as blocks of `length` tokens; each token but the first is a target once."""
    tokens = np.array(stream, np.int32)
    found = [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]
    return make_blocks(list(range(number, number + len(found))), found)


def make_blocks(numbers: list[int], blocks: list[np.ndarray]) -> list[Sequence]:
    """Running text, each block (n + 1,) int32: n tokens that are each asked for the next."""
    made = []
    for number, tokens in zip(numbers, blocks, strict=True):
        rows = np.arange(len(tokens) - 1, dtype=np.int32)
        made.append(Sequence(number, tokens[:-1], None, rows, tokens[1:].astype(np.int64)))
    return made


def probe(number: int, ids: np.ndarray, model: Model) -> Sequence:
    """These tokens (n,) int32, each asked for the next."""
    return Sequence(number, ids, None, np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int64))


def summary(model: Model, sequences: list[Sequence]) -> list[str]:
    """Nothing beside the counts."""
    return []


def end_of_text(model: Model | None, tokenizer: Tokenizer) -> int:
    """The id of the token that ends a completion: the checkpoint's eos_token_id, else the tokenizer's own.

    Raises InputError where neither says one that the tokenizer has.
    """
    return ends_of_text(model, tokenizer)[0]


def ends_of_text(model: Model | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of all tokens that end a completion; the first is the one that is learned."""
    declared = model.settings.get("eos_token_id") if model else None
    found = declared if isinstance(declared, list) else [declared]
    found = [i for i in found if type(i) is int and tokenizer.token(i) is not None]
    if tokenizer.end in found or not found:
        found = [tokenizer.end, *(i for i in found if i != tokenizer.end)]
    if found == [None]:
        raise InputError(
            "the checkpoint has no token that ends a completion; expected an eos_token_id in config.json, or an "
            "eos_token in tokenizer_config.json, that is in the vocabulary"
        )
    return found


def next_command(folder: str, example: Passage, tokenizer: Tokenizer) -> str:
    """The completion of another prompt."""
    return f'minift generate --model {folder} --prompt "..."'


def question(passage: Passage | Piece, tokenizer: Tokenizer | None) -> tuple[Passage, str] | None:
    """What stands before the last part that is learned, and that part; None for running text."""
    if isinstance(passage, Piece):
        return None
    last = max(i for i, (_, is_learned) in enumerate(passage.parts) if is_learned)
    return replace(passage, parts=passage.parts[:last]), passage.parts[last][0]


class Metrics:
    """Loss per target token, perplexity and token accuracy of a stream of batches."""

    best = ("loss", min)  # which metric picks the best model, and how

    def __init__(self, model: Model):
        self.model = model
        self.sums = torch.zeros(3, dtype=torch.float64, device=model.device)  # loss, tokens right, tokens

    def add(self, batch: Batch) -> None:
        """One more batch."""
        total, right = loss(self.model, batch, SILENT)
        self.sums += torch.stack([total.double(), right.double(), torch.full_like(right, batch.n_targets).double()])

    def result(self) -> dict[str, float]:
        """Weighted by tokens, so the sizes of batches change nothing. Raises InputError where there are none."""
        total, right, tokens = self.sums.tolist()
        if not tokens:
            raise InputError("nothing can be measured: none of the tokens is asked about; expected more text")
        mean = total / tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {"loss": mean, "perplexity": perplexity, "accuracy": right / tokens, "tokens": int(tokens)}
