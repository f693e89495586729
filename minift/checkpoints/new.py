"""A model folder from nothing but text: a tokenizer learned from it, and a config.json of the size that is asked for.

Its weights are drawn when it is trained (`minift train --init random`).
"""

import json
from pathlib import Path

from ..config import NewConfig
from ..data.texts import stream_texts, text_of
from ..data.tokenizer import Tokenizer
from ..data.vocabulary import learn_tokenizer
from ..errors import InputError
from ..files import check_new_folder, write_folder
from ..models import family_named
from .loading import build

ENDS = ("bos_token", "eos_token", "pad_token")  # whose ids stand in config.json


def make_folder(config: NewConfig) -> str:
    """Writes the folder `config.out`; returns what is in it, in a sentence. Raises InputError, OSError."""
    family = family_named(config.family)
    if config.width % config.heads:
        raise InputError(f"--width is {config.width} with --heads {config.heads}; expected a number that heads divide")
    folder = Path(config.out)
    check_new_folder("--out", folder)
    texts = stream_texts(config.data, config.columns, header=config.header, max_line=config.max_line)
    tokenizer = learn_tokenizer(family.TOKENIZER, lambda: map(text_of, texts), config.vocab, config.lowercase)
    settings = settings_of_size(config, tokenizer)
    size = build(settings, folder, None, [], -1).size()

    def put_files(aside: Path) -> None:
        (aside / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(aside)

    write_folder(folder, put_files)
    return f"{folder}: a {config.family} of {size:,} weights without its head, with {tokenizer.vocab_size:,} tokens"


def settings_of_size(config: NewConfig, tokenizer: Tokenizer) -> dict:
    """config.json of the new model, whose special tokens are those of its tokenizer."""
    family = family_named(config.family)
    size = family.sized(tokenizer.vocab_size, config.width, config.layers, config.heads, config.positions)
    ids = {f"{name}_id": tokenizer.id(family.TOKENIZER.tokens.get(name, "")) for name in ENDS}
    named = {name: i for name, i in ids.items() if i is not None}
    return {"model_type": config.family, "architectures": [family.ARCHITECTURE], **size, **named}
