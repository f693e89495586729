"""A tokenizer made from text: the vocabulary is learned by the tokenizers library, the rules are a family's own."""

from collections.abc import Iterable

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ..errors import InputError
from .tokenizer import Rules, Tokenizer, WordPiece, tokenizer_of

LEAST = 2  # times that a pair of pieces has to be met to become one
ALPHABET = 1000  # characters that word pieces are made of, the most frequent


def learn_tokenizer(rules: Rules, texts: Iterable[str], size: int, lowercase: bool) -> Tokenizer:
    """A tokenizer of at most `size` tokens, learned from `texts`, each of which is gone through once.

    lowercase: of word pieces, whether capitals are read as small letters. Raises InputError where `size` has no room
    for the special tokens and, of byte-level BPE, for each of the 256 bytes.
    """
    special = list(dict.fromkeys(rules.tokens.values()))
    settings = {"tokenizer_class": rules.classes[0] + "Tokenizer", **rules.tokens}
    if isinstance(rules, WordPiece):
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token=rules.tokens["unk_token"]))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=LEAST, special_tokens=special, limit_alphabet=ALPHABET
        )
        settings["do_lower_case"] = lowercase
        alphabet = 0
    else:
        bytes_ = pre_tokenizers.ByteLevel.alphabet()
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=size, min_frequency=LEAST, special_tokens=special, initial_alphabet=bytes_
        )
        alphabet = len(bytes_)
    least = len(special) + alphabet
    if size < least:
        raise InputError(f"--vocab is {size}; expected at least {least}, the special tokens and the alphabet")

    trainer.show_progress = False
    backend.train_from_iterator(texts, trainer)
    return tokenizer_of(backend, settings, rules)
