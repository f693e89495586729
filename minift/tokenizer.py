"""A tokenizer from whatever a checkpoint has: tokenizer.json, BERT's vocab.txt, or GPT-2's vocab.json and merges.txt.

Truncation is done here and not by the library. The library keeps what it cuts off: for a pair of long texts, every
combination of their pieces (3.7 GB for two texts of 2,000 tokens cut to 16); and its truncation is a state of the
tokenizer, which one call would leave to the next.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Encoding, decoders, models, normalizers, pre_tokenizers, processors

from .config import InputError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
BATCH = 1000  # texts handed over at once: the library's encodings take about 100 bytes per token while they live


@dataclass(frozen=True, slots=True)
class Tokens:
    ids: list[int]
    types: list[int]  # segment: 0 for the text, 1 for its pair
    truncated: bool


class Tokenizer:
    """Text to token ids and back. vocab_size is the largest id + 1, added tokens included."""

    def __init__(self, backend: tokenizers.Tokenizer, files: dict[str, bytes]):
        backend.no_truncation()  # of the file's own: MiniLM's cuts at 128 and pads to 128
        backend.no_padding()
        self.backend = backend
        self.files = files  # name -> content, as the checkpoint had them
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1

    def encode(self, texts: list[str], pairs: list[str | None] | None = None, max_length: int = 0) -> list[Tokens]:
        """Texts, alone or each with its pair, as token ids with the special tokens.

        max_length: most tokens per text, special ones included; the longer of a pair is cut first, at its end. 0: all.
        Raises InputError if the special tokens alone are more, or if a text is not valid Unicode.
        """
        pairs = pairs or [None] * len(texts)
        inputs = [text if pair is None else (text, pair) for text, pair in zip(texts, pairs, strict=True)]
        special = self.backend.num_special_tokens_to_add(any(pair is not None for pair in pairs))
        if max_length < 0 or 0 < max_length < special:
            raise InputError(f"--max-length {max_length}: expected at least {special}, the special tokens alone")
        for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
            _check_unicode(i, text + (pair or ""))
        tokens = []
        for start in range(0, len(inputs), BATCH):
            tokens += [_cut(e, max_length) for e in self.backend.encode_batch(inputs[start : start + BATCH])]
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without the special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def id(self, token: str) -> int | None:
        """The id of a token, or None if there is no such token."""
        return self.backend.token_to_id(token)

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint's own tokenizer files, and a tokenizer.json if it had none."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def _check_unicode(i: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, as JSON's "\ud83d"; the library says "must be str"
        raise InputError(f"text {i} has the lone surrogate {text[error.start]!r}; expected valid Unicode") from None


def _cut(encoding: Encoding, max_length: int) -> Tokens:
    """Drop tokens at the ends of the text and of its pair, and no special ones, until max_length are left."""
    ids, types = encoding.ids, encoding.type_ids
    if not max_length or len(ids) <= max_length:
        return Tokens(ids, types, truncated=False)
    parts = encoding.sequence_ids  # 0 for the text, 1 for its pair, None for special tokens
    left = list(_longest_first(parts.count(0), parts.count(1), max_length - parts.count(None)))
    kept = []
    for at, part in enumerate(parts):
        if part is None:
            kept.append(at)
        elif left[part]:
            kept.append(at)
            left[part] -= 1
    return Tokens([ids[at] for at in kept], [types[at] for at in kept], truncated=True)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths after cutting, as the library's strategy "longest_first" (tokenizers, src/utils/truncation.rs)."""
    short = min(first, second, room // 2)
    return (short, min(second, room - short)) if first <= second else (min(first, room - short), short)


# ---- loading ---------------------------------------------------------------------------------------------------------


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. All is read now, so the folder may go. Raises InputError."""
    files = {name: (Path(folder) / name).read_bytes() for name in FILES if (Path(folder) / name).is_file()}
    names = next((names for names in BUILDERS if files.keys() >= set(names)), None)
    if names is None:
        raise InputError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt")
    try:
        backend = BUILDERS[names](files)
        if "tokenizer.json" not in files:
            _add_tokens(backend, _json(files, "added_tokens.json"))
            files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    except Exception as error:  # the library raises no narrower one
        raise InputError(f"{folder}: no tokenizer can be made of {' and '.join(names)} ({error})") from error
    return Tokenizer(backend, files)


def _json(files: dict[str, bytes], name: str) -> dict:
    """The object in a JSON file; a file that is not there is an empty one."""
    try:
        return dict(json.loads(files.get(name, b"{}")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} does not hold a JSON object: {error}") from error


def _whole(files: dict[str, bytes]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])


def _wordpiece(files: dict[str, bytes]) -> tokenizers.Tokenizer:
    """BERT's, from vocab.txt: one token per line, the id is the number of the line."""
    settings = _json(files, "tokenizer_config.json")
    lines = files["vocab.txt"].decode().removesuffix("\n").split("\n")  # splitlines() would split at U+2028, a token
    vocab = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    if lacking := [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]:
        raise InputError(f"vocab.txt lacks {', '.join(lacking)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),  # None: as lowercase
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocab])
    return backend


def _byte_bpe(files: dict[str, bytes]) -> tokenizers.Tokenizer:
    """GPT-2's, from vocab.json and merges.txt. No special tokens are put around a text."""
    prefix = _json(files, "tokenizer_config.json").get("add_prefix_space", False)
    vocab = _json(files, "vocab.json")
    lines = files["merges.txt"].decode().split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in ("<|endoftext|>",) if token in vocab])
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, added: dict[str, int]) -> None:
    """The tokens of added_tokens.json, which stood beside a vocabulary before there was a tokenizer.json."""
    for token in sorted(added, key=added.get):
        backend.add_tokens([token])
        if backend.token_to_id(token) != added[token]:
            raise InputError(
                f"added_tokens.json gives {token!r} the id {added[token]}; the vocabulary leaves "
                f"{backend.token_to_id(token)}"
            )


BUILDERS = {("tokenizer.json",): _whole, ("vocab.txt",): _wordpiece, ("vocab.json", "merges.txt"): _byte_bpe}
