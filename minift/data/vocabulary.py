"""A tokenizer made from text: the vocabulary is learned by the tokenizers library, the rules are a family's own."""

from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ..errors import InputError
from .tokenizer import Rules, Tokenizer, WordPiece, tokenizer_of

LEAST = 2  # times that a pair of pieces has to be met to become one
ALPHABET = 1000  # characters that word pieces are made of, the most frequent
INSIDE = "##"  # before a piece that does not begin a word


def learn_tokenizer(rules: Rules, read: Callable[[], Iterable[str]], size: int, lowercase: bool) -> Tokenizer:
    """A tokenizer of at most `size` tokens, learned from the texts that read() gives, the same ones each time.

    lowercase: of word pieces, whether capitals are read as small letters. Raises InputError where `size` has no room
    for the special tokens and the alphabet (of byte-level BPE, each of the 256 bytes), and where there is no word.
    """
    special = list(dict.fromkeys(rules.tokens.values()))
    settings = {"tokenizer_class": rules.classes[0] + "Tokenizer", **rules.tokens}
    if isinstance(rules, WordPiece):
        backend = learn_word_pieces(special, rules.tokens["unk_token"], read, size, lowercase)
        settings["do_lower_case"] = lowercase
    else:
        backend = learn_bytes(special, read, size)
    found = backend.get_vocab_size()
    if found == len(special):
        raise InputError("the text has no word to learn a tokenizer from")
    if found > size:  # the alphabet is taken whole
        raise InputError(f"--vocab is {size}; expected at least {found}, the special tokens and the alphabet")
    return tokenizer_of(backend, settings, rules)


def learn_word_pieces(
    special: list[str], unknown: str, read: Callable[[], Iterable[str]], size: int, lowercase: bool
) -> tokenizers.Tokenizer:
    """A WordPiece model.

    The library numbers letters inside words in the order of a hash table, another one each time, and settles ties by
    these numbers. So a first pass learns which letters there are, and a second has them in the order of the alphabet.
    """
    letters: list[str] = []
    for size_of_pass in (0, size):
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size_of_pass,
            min_frequency=LEAST,
            special_tokens=special + letters,
            limit_alphabet=ALPHABET,
            show_progress=False,
        )
        backend.train_from_iterator(read(), trainer)
        letters = sorted(token for token in backend.get_vocab() if token.startswith(INSIDE))
    return tokenizers.Tokenizer(models.WordPiece(backend.get_vocab(), unk_token=unknown))


def learn_bytes(special: list[str], read: Callable[[], Iterable[str]], size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE model."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=LEAST,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(read(), trainer)
    return backend
