"""The token behind a mask: BERT learns a language from text alone (https://arxiv.org/abs/1810.04805, section 3.1).

A token is asked about with probability 0.15. What the model then reads in its place is [MASK] in 80 of 100 cases,
another token in 10, and the token itself in 10. All of it is drawn anew in each step by the hash that dropout uses, a
function of (seed, step, example, position): it does not depend on how a step is split or packed, nor on a resume.
What is held out is asked about the same tokens each time, whatever the seed of the run.

Running text is cut into blocks, each with [CLS] and [SEP] around it; other texts are cut where they are too long, and
nothing of them is lost. In `predict` the masks are those in the text.

N tokens, M rows, V vocabulary. What each name below is for: tasks/__init__.py.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from ..data import corpus
from ..data.batch import Batch, Sequence, token_keys
from ..data.corpus import Blocks, Piece
from ..data.examples import Example, examples_from
from ..data.passages import Passage
from ..data.texts import stream_texts, text_of
from ..data.tokenizer import BATCH, Tokenizer
from ..errors import InputError
from ..models import Model
from ..ops.dropout import MASK as WORD
from ..ops.dropout import Noise
from . import complete
from .classify import loss as loss

NAMED_CLASSES = False
PEFT_TYPE = None  # PEFT has no type for it
PEFT_HEADS = ()
COUNTED = "accuracy"
CHECKS = None

ASKED = 0.15  # of a text's tokens
HIDDEN = 0.8  # of those asked about: shown as [MASK]
CHANGED = 0.1  # shown as any token of the vocabulary
SITES = 1 << 20  # numbers of the draws' places in the hash, above those of any model's dropout
HELD_OUT = (0, WORD)  # (seed, step) of the draw that held-out texts have; no run comes to that step

SHOWN = 400  # characters of a text that a report asks about
BEST = 5  # tokens that `predict` tells of each mask

stream = stream_texts
settings = complete.settings
label_names = complete.label_names
summary = complete.summary
Metrics = complete.Metrics


def from_rows(rows: list, labelled: bool = True) -> list[Example]:
    """The texts in a list: "a text", or {"text": ...}."""
    return examples_from(rows, labelled=False)


# the head, and what checkpoints say of it


def architecture(family: ModuleType) -> str | None:
    """What transformers calls a family with this head."""
    head = family.HEADS.get("masked")
    return head.architecture if head else None


def make_head(family: ModuleType, config, n_labels: int) -> nn.Module:
    """The family's head for the token behind a mask."""
    return family.HEADS["masked"](config, n_labels)


# texts -> sequences


@dataclass(slots=True, kw_only=True)
class Text(Sequence):
    """A sequence as a draw of masks shows it, with the tokens that it has in truth."""

    whole: np.ndarray  # (n,) int32
    tokenizer: Tokenizer


def mask_of(tokenizer: Tokenizer) -> str:
    """The token that hides another, [MASK] or its like. Raises InputError where the tokenizer has none."""
    if tokenizer.mask is None:
        raise InputError("the tokenizer has no mask_token, which stands for a hidden word; expected [MASK] or its like")
    return tokenizer.token(tokenizer.mask)


def judge(texts: Iterable, model: Model, tokenizer: Tokenizer, labelled: bool = True) -> list[bool]:
    """Whether masks are drawn, for each text; else they are to be in it. Raises InputError where one has none."""
    mask = mask_of(tokenizer)
    found = []
    for text in texts:
        if not labelled and mask not in text_of(text):
            raise InputError(f"{text.where}: found no {mask} in the text; expected one or more, which are filled in")
        found.append(labelled)
    return found


def encode(
    texts: list[Example | Passage] | list[Piece],
    model: Model,
    tokenizer: Tokenizer,
    max_length: int,
    labelled: bool = True,
) -> list[Sequence] | Blocks:
    """Tokens with some of them hidden, as held-out texts are asked; at_step draws others. Raises InputError."""
    mask_of(tokenizer)  # there has to be one

    def make(numbers: list[int], blocks: list[np.ndarray]) -> list[Text]:
        framed_blocks = [framed(number, ids, tokenizer) for number, ids in zip(numbers, blocks, strict=True)]
        return draw(framed_blocks, *HELD_OUT)

    if corpus.is_running(texts):
        where = texts[0].text.name
        found = corpus.blocks(texts, tokenizer, room_of(tokenizer, max_length), 0, make)
    else:
        where = texts[0].where
        found = list(encoded(texts, judge(texts, model, tokenizer, labelled), model, tokenizer, max_length))
    if not found:
        raise InputError(f"{where}: nothing to learn from; expected a token or more")
    return found


def room_of(tokenizer: Tokenizer, max_length: int) -> int:
    """How many tokens of a text stand between the special ones. Raises InputError where there is no room at all."""
    ends = len(tokenizer.before) + len(tokenizer.behind)
    if max_length <= ends:
        raise InputError(
            f"--max-length is {max_length}; expected at least {ends + 1}, a token between the special ones"
        )
    return max_length - ends


def encoded(
    texts: Iterable, labels: Iterable[bool], model: Model, tokenizer: Tokenizer, max_length: int
) -> Iterator[Sequence]:
    """The same one at a time, BATCH texts read ahead."""
    room = room_of(tokenizer, max_length)
    texts = iter(texts)
    labels = iter(labels)
    left: list[int] = []  # of running text, what does not fill a block yet
    number = 0
    while part := list(islice(texts, BATCH)):
        is_drawn = all(list(islice(labels, len(part))))
        tokens = [found.ids for found in tokenizer.encode([text_of(text) for text in part], special=False)]
        if is_drawn:
            blocks, left = cut_blocks(part, tokens, left, room)
            sequences = draw([framed(number + i, block, tokenizer) for i, block in enumerate(blocks)], *HELD_OUT)
        else:
            sequences = [as_written(number + i, ids, room, tokenizer) for i, ids in enumerate(tokens)]
        yield from sequences
        number += len(sequences)
    if left:
        yield from draw([framed(number, left, tokenizer)], *HELD_OUT)


def cut_blocks(
    texts: list[Example | Passage], tokens: list[list[int]], left: list[int], room: int
) -> tuple[list[list[int]], list[int]]:
    """(blocks of at most `room` tokens, what is left of running text, which goes on in the next passage)."""
    blocks = []
    for text, ids in zip(texts, tokens, strict=True):
        ids = left + ids
        end = len(ids)
        if isinstance(text, Passage):
            end -= end % room
        blocks += [ids[start : start + room] for start in range(0, end, room)]
        left = ids[end:]
    return blocks, left


def framed(number: int, ids: list[int] | np.ndarray, tokenizer: Tokenizer) -> Text:
    """These tokens with the special ones around them, nothing of them hidden yet."""
    whole = np.array([*tokenizer.before, *ids, *tokenizer.behind], np.int32)
    none = np.zeros(0, np.int64)
    return Text(number, whole, None, none.astype(np.int32), none, whole=whole, tokenizer=tokenizer)


def as_written(number: int, ids: list[int], room: int, tokenizer: Tokenizer) -> Text:
    """The same, asked about the masks that are in the text itself."""
    text = framed(number, ids[:room], tokenizer)
    rows = np.flatnonzero(text.ids == tokenizer.mask)
    return replace(text, rows=rows.astype(np.int32), targets=np.zeros(len(rows), np.int64), cut=len(ids) > room)


def at_step(texts: list[Text], seed: int, step: int) -> list[Text]:
    """The same texts as this step of a run asks about them."""
    return draw(texts, seed, step)


def draw(texts: list[Text], seed: int, step: int) -> list[Text]:
    """The texts with tokens hidden as (seed, step), their numbers and the tokens' places say, whatever was hidden."""
    if not texts:
        return []
    sizes = np.array([len(text) for text in texts])
    begins = sizes.cumsum() - sizes
    numbers = np.repeat(np.array([text.number for text in texts]), sizes)
    indices = np.arange(sizes.sum()) - np.repeat(begins, sizes)
    noise = Noise(seed, step, token_keys(torch.from_numpy(numbers), torch.from_numpy(indices)))
    which, how, what = (uniform(noise.rows(SITES + i)) for i in range(3))  # (N,) each

    tokenizer = texts[0].tokenizer
    whole = np.concatenate([text.whole for text in texts])
    asked = (which < ASKED) & ~np.isin(whole, list(tokenizer.special))
    hidden = asked & (how < HIDDEN)
    changed = asked & ~hidden & (how < HIDDEN + CHANGED)
    shown = np.where(hidden, tokenizer.mask, whole).astype(np.int32)
    shown[changed] = what[changed] * tokenizer.vocab_size
    drawn = []
    for text, begin in zip(texts, begins, strict=True):
        place = slice(begin, begin + len(text))
        rows = np.flatnonzero(asked[place])
        targets = text.whole[rows].astype(np.int64)
        drawn.append(replace(text, ids=shown[place], rows=rows.astype(np.int32), targets=targets))
    return drawn


def uniform(words: Tensor) -> np.ndarray:
    """Hashed int32 words as numbers from 0 to below 1, float64."""
    return words.numpy().view(np.uint32) / 2.0**32


def probe(number: int, ids: np.ndarray, model: Model) -> Sequence:
    """These tokens (n,) int32, each asked for itself."""
    return Sequence(number, ids, None, np.arange(len(ids), dtype=np.int32), ids.astype(np.int64))


# what is told


def next_command(folder: str, example: Example | Passage, tokenizer: Tokenizer) -> str:
    """What stands behind the mask of another text."""
    return f'minift predict --task fill --model {folder} --text "... {mask_of(tokenizer)} ..."'


def question(example: Example | Piece, tokenizer: Tokenizer | None) -> tuple[Example, str] | None:
    """The text with the word in its middle behind a mask, and that word; None of running text, and without words."""
    if isinstance(example, Piece):
        return None
    words = list(re.finditer(r"\w+", text_of(example)[:SHOWN]))
    if not words:
        return None
    word = words[len(words) // 2]
    mask = word[0] if tokenizer is None else mask_of(tokenizer)
    text = word.string[: word.start()] + mask + word.string[word.end() :]
    return Example(text, None, None, example.where), word[0]


def predictions(model: Model, batch: Batch, tokenizer: Tokenizer) -> list[dict]:
    """One object a sequence: the text with its masks filled, and the likeliest tokens of each with probabilities."""
    best = model.logits(batch).float().softmax(-1).topk(BEST)  # (M, 5)
    filled = batch.ids.clone()
    filled[batch.rows] = best.indices[:, 0]
    masks = []
    for ids, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        mask: dict[str, float] = {}
        for i, score in zip(ids, scores, strict=True):
            name = tokenizer.decode([i]) or tokenizer.token(i) or f"token {i}"  # special ones decode to nothing
            mask.setdefault(name, score)  # parts of a character look alike: the likeliest stays
        masks.append(mask)
    found = []
    for start, end in zip(batch.offsets.tolist(), batch.offsets[1:].tolist(), strict=False):
        mine = [mask for row, mask in zip(batch.rows.tolist(), masks, strict=True) if start <= row < end]
        found.append({"text": tokenizer.decode(filled[start:end].tolist()), "masks": mine})
    return found
