"""A tokenizer from whatever a checkpoint has: tokenizer.json, BERT's vocab.txt, or GPT-2's vocab.json and merges.txt.

Where tokenizer.json and tokenizer_config.json disagree, the second holds, as in transformers: a BertTokenizer
lowercases, strips accents and splits as the settings say (or their defaults), a GPT2Tokenizer adds a space as they say.
Of any other tokenizer_class, tokenizer.json holds.

Truncation is done here and not by the library. The library keeps what it cuts off: for a pair of long texts, every
combination of their pieces (3.7 GB for two texts of 2,000 tokens cut to 16); and its truncation is a state of the
tokenizer, which one call would leave to the next.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Encoding, decoders, models, normalizers, pre_tokenizers, processors

from ..config import parse_json
from ..errors import InputError

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
GROWTH = 256  # most characters that rules may make of one; "ﷺ" becomes 18 by Unicode's own

# tokenizer_class without "Tokenizer" and "Fast", of which transformers makes BERT's tokenizer, or GPT-2's
BERT = ("Bert", "DistilBert", "Electra", "MobileBert", "LayoutLM", "Lxmert", "ConvBert", "SqueezeBert")
GPT2 = ("GPT2",)
LARGEST = 10**7  # ids of tokens are below this
ENDS = ("<|endoftext|>", "[SEP]")  # what ends a text where no eos_token is declared
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRAS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, slots=True)
class Tokens:
    ids: list[int]
    types: list[int]  # segment: 0 for the text, 1 for its pair
    truncated: bool


class Tokenizer:
    """Text to token ids and back.

    vocab_size: the largest id + 1, added tokens and those of the template included. types: the same of the token types
    of a text alone. before: the special tokens in front of a text. end: the id of what ends a text, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        files: dict[str, bytes],
        ends: tuple[str | None, ...] = ENDS,
        side: str = "right",
    ):
        backend.no_truncation()  # of the file's own: MiniLM's cuts at 128 and pads to 128
        backend.no_padding()
        self.backend = backend
        self.side = side  # of a text where it is cut, as its truncation_side says
        self.files = files  # name -> content, as the checkpoint had them
        probe = backend.encode("a")
        parts = [*probe.sequence_ids, 0]
        self.before = probe.ids[: parts.index(0)]
        self.types = max(probe.type_ids, default=0) + 1
        self.vocab_size = max(*backend.get_vocab().values(), *probe.ids, -1, -1) + 1
        found = [backend.token_to_id(token) for token in ends if token]
        self.end = next((i for i in found if i is not None), None)

    def encode(
        self,
        texts: list[str],
        pairs: list[str | None] | None = None,
        max_length: int = 0,
        special: bool = True,
    ) -> list[Tokens]:
        """Texts, alone or each with its pair, as token ids with the special tokens.

        max_length: most tokens per text, special ones included; the longer of a pair is cut first, at its end. 0: all.
        special: whether with the special tokens that stand around a text.
        Raises InputError if the special tokens alone are more, or if a text is not valid Unicode.
        """
        pairs = pairs or [None] * len(texts)
        inputs = [text if pair is None else (text, pair) for text, pair in zip(texts, pairs, strict=True)]
        least = self.backend.num_special_tokens_to_add(any(pair is not None for pair in pairs))
        if max_length < 0 or 0 < max_length < least:
            raise InputError(f"--max-length {max_length}: expected at least {least}, the special tokens alone")
        for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
            _check_unicode(i, text + (pair or ""))
        tokens = []
        for start in range(0, len(inputs), BATCH):
            try:
                found = self.backend.encode_batch(inputs[start : start + BATCH], add_special_tokens=special)
            except Exception as error:  # the library raises no narrower one
                raise InputError(f"texts {start} to {start + BATCH}: the tokenizer fails ({error})") from error
            tokens += [_cut(e, max_length, self.side) for e in found]
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without the special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def id(self, token: str) -> int | None:
        """The id of a token, or None if there is no such token."""
        return self.backend.token_to_id(token)

    def token(self, id: int) -> str | None:
        """The token of an id, or None if there is no such id."""
        return self.backend.id_to_token(id) if 0 <= id < self.vocab_size else None

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint's own tokenizer files, and a tokenizer.json if it had none."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def _check_unicode(i: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, as JSON's "\ud83d"; the library says "must be str"
        raise InputError(f"text {i} has the lone surrogate {text[error.start]!r}; expected valid Unicode") from None


def _cut(encoding: Encoding, max_length: int, side: str = "right") -> Tokens:
    """Drop tokens at the ends of the text and of its pair, and no special ones, until max_length are left.

    side: "left" drops them at the beginnings.
    """
    ids, types = encoding.ids, encoding.type_ids
    if not max_length or len(ids) <= max_length:
        return Tokens(ids, types, truncated=False)
    parts = encoding.sequence_ids  # 0 for the text, 1 for its pair, None for special tokens
    left = list(_longest_first(parts.count(0), parts.count(1), max_length - parts.count(None)))
    kept = []
    if side == "left":
        parts = parts[::-1]
    for at, part in enumerate(parts):
        if part is None:
            kept.append(at)
        elif left[part]:
            kept.append(at)
            left[part] -= 1
    if side == "left":
        kept = [len(parts) - 1 - at for at in reversed(kept)]
    return Tokens([ids[at] for at in kept], [types[at] for at in kept], truncated=True)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths after cutting, as the library's strategy "longest_first" (tokenizers, src/utils/truncation.rs)."""
    short = min(first, second, room // 2)
    return (short, min(second, room - short)) if first <= second else (min(first, room - short), short)


# ---- loading ---------------------------------------------------------------------------------------------------------


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any(all((folder / name).is_file() for name in names) for names in BUILDERS)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. All is read now, so the folder may go. Raises InputError."""
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    names = next((names for names in BUILDERS if files.keys() >= set(names)), None)
    if names is None:
        raise InputError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt")
    try:
        settings = _settings(files)
        kind = _kind(settings, folder, names)
        backend = BUILDERS[names](files, settings)
        _follow_settings(backend, settings, kind)
        _add_tokens(backend, files, settings)
        _check_rules(backend)
        if "tokenizer.json" not in files:
            files["tokenizer.json"] = backend.to_str(pretty=True).encode()
        side = settings.get("truncation_side") or (backend.truncation or {}).get("direction", "right")
        if side not in ("left", "right"):
            raise InputError(f"truncation_side is {str(side)[:80]}; expected left or right")
        ends = [_content(settings.get(key)) for key in ("eos_token", "sep_token")]
        return Tokenizer(backend, files, (ends[0], *ENDS, ends[1]), side)
    except InputError as error:
        raise InputError(f"{folder}: no tokenizer can be made of {' and '.join(names)} ({error})") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises no narrower one, and its panics are no Exception
        raise InputError(f"{folder}: no tokenizer can be made of {' and '.join(names)} ({error})") from error


def _json(files: dict[str, bytes], name: str) -> dict:
    """The object in a JSON file; a file that is not there is an empty one."""
    found = parse_json(files.get(name, b"{}"), name)
    if not isinstance(found, dict):
        raise InputError(f"{name} does not hold a JSON object")
    return found


def _settings(files: dict[str, bytes]) -> dict:
    """tokenizer_config.json, with what special_tokens_map.json adds where it names no added tokens itself."""
    settings = _json(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _json(files, "special_tokens_map.json")
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space"):
        if not isinstance(settings.get(name, False), (bool, type(None))):
            raise InputError(f"tokenizer_config.json: {name} is {str(settings[name])[:80]}; expected true or false")
    for name, kinds in (("added_tokens_decoder", dict), *((name, list | dict) for name in EXTRAS)):
        if settings.get(name) is not None and not isinstance(settings[name], kinds):
            raise InputError(f"tokenizer_config.json: {name} is {str(settings[name])[:80]}; expected tokens")
    return settings


def _kind(settings: dict, folder: Path, names: tuple[str, ...]) -> str:
    """What transformers would make of the files: "bert" or "gpt2"; or "", where tokenizer.json is taken as it is."""
    path = folder / "config.json"
    model = parse_json(path.read_bytes(), path) if path.is_file() else {}
    model = model if isinstance(model, dict) else {}
    declared = settings.get("tokenizer_class") or model.get("tokenizer_class")
    if declared is None:
        default = {"vocab.txt": "bert", "vocab.json": "gpt2"}.get(names[0], model.get("model_type"))
        return default if default in ("bert", "gpt2") else ""
    name = str(declared).removesuffix("Fast").removesuffix("Tokenizer")
    kind = next((kind for kind, known in (("bert", BERT), ("gpt2", GPT2)) if name in known), "")
    if name == "BertJapanese":
        raise InputError("tokenizer_class is BertJapaneseTokenizer, which splits words by MeCab; that is not supported")
    expected = {"vocab.txt": "bert", "vocab.json": "gpt2"}.get(names[0], kind)
    if kind != expected:
        raise InputError(f"tokenizer_class is {declared}, whose rules are not known here; expected a tokenizer.json")
    return kind


def _whole(files: dict[str, bytes], settings: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])


def _wordpiece(files: dict[str, bytes], settings: dict) -> tokenizers.Tokenizer:
    """BERT's, from vocab.txt: one token per line, the id is the number of the line."""
    lines = files["vocab.txt"].decode().rstrip("\r\n").split("\n")  # splitlines() would split at U+2028, a token
    vocab = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    special = {key: _content(settings.get(key)) or default for key, default in BERT_TOKENS.items()}
    if lacking := [special[key] for key in ("unk_token", "cls_token", "sep_token") if special[key] not in vocab]:
        raise InputError(f"vocab.txt lacks {', '.join(lacking)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))
    backend.add_special_tokens([token for token in special.values() if token in vocab])
    return backend


def _byte_bpe(files: dict[str, bytes], settings: dict) -> tokenizers.Tokenizer:
    """GPT-2's, from vocab.json and merges.txt. No special tokens are put around a text."""
    vocab = _json(files, "vocab.json")
    largest = max((i for i in vocab.values() if isinstance(i, int)), default=0)
    if largest >= LARGEST:  # the library counts all that are missing below
        raise InputError(f"vocab.json has the id {largest}; expected below {LARGEST:,}")
    lines = files["merges.txt"].decode().split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([token for token in ("<|endoftext|>",) if token in vocab])
    if settings.get("add_bos_token") or settings.get("add_eos_token"):
        backend.post_processor = _ends(backend, settings)
    return backend


BERT_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def _follow_settings(backend: tokenizers.Tokenizer, settings: dict, kind: str) -> None:
    """Makes the tokenizer what its class makes of the settings, whatever tokenizer.json said (transformers 5)."""
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None  # else a text would have other tokens each time
    if kind == "bert" and isinstance(backend.model, models.WordPiece):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),  # None: as lowercase
            lowercase=settings.get("do_lower_case", True),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        cls, sep = (_content(settings.get(key)) or BERT_TOKENS[key] for key in ("cls_token", "sep_token"))
        if lacking := [token for token in (cls, sep) if backend.token_to_id(token) is None]:
            raise InputError(f"the vocabulary lacks {', '.join(lacking)}")
        backend.post_processor = processors.BertProcessing(
            (sep, backend.token_to_id(sep)), (cls, backend.token_to_id(cls))
        )
    if kind == "gpt2" and isinstance(backend.model, models.BPE):
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
        backend.decoder = decoders.ByteLevel()


def _ends(backend: tokenizers.Tokenizer, settings: dict) -> processors.TemplateProcessing:
    """What add_bos_token and add_eos_token put around a text, where there is no tokenizer.json to say so."""
    bos, eos = (
        _content(settings.get(f"{end}_token")) or "<|endoftext|>" if settings.get(f"add_{end}_token") else None
        for end in ("bos", "eos")
    )
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token}
    if None in ids.values():
        raise InputError(f"add_bos_token or add_eos_token is true, but the vocabulary lacks {bos or eos}")
    before, after = f"{bos}:0 " if bos else "", f" {eos}:0" if eos else ""
    return processors.TemplateProcessing(
        single=f"{before}$A:0{after}",
        pair=f"{before}$A:0{after} {before.replace(':0', ':1')}$B:1{after.replace(':0', ':1')}".replace("  ", " "),
        special_tokens=list(ids.items()),
    )


def _add_tokens(backend: tokenizers.Tokenizer, files: dict[str, bytes], settings: dict) -> None:
    """Adds the tokens that stand beside the vocabulary: in three places, of three ages.

    added_tokens_decoder of tokenizer_config.json; else added_tokens.json; and additional_special_tokens.
    """
    declared = settings.get("added_tokens_decoder")
    if declared is None:
        declared = {i: token for token, i in _json(files, "added_tokens.json").items()}
        place = "added_tokens.json"
    else:
        place = "tokenizer_config.json"
    by_id = {int(i): token for i, token in declared.items()}
    for i, token in sorted(by_id.items()):
        token = AddedToken(**token) if isinstance(token, dict) else AddedToken(token)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        left = backend.token_to_id(token.content)
        if left != i:
            raise InputError(f"{place} gives {token.content!r} the id {i}; the vocabulary leaves {left}")
    lists = [settings.get(key) or () for key in EXTRAS]
    extras = [token for some in lists for token in (some.values() if isinstance(some, dict) else some)]
    named = [_content(settings.get(key)) for key in NAMED]
    known = {token for token in named if token and backend.token_to_id(token) is not None}
    new = [AddedToken(_content(token), special=True, normalized=False) for token in extras]
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    new += [AddedToken(token, special=True) for token in known]
    backend.add_special_tokens([token for token in new if token.content not in there])


def _content(token: object) -> str | None:
    """A special token's text: written as it is, or as an object with more about it."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise InputError(f"a special token is {str(token)[:80]}; expected a string")
    return content


def _check_rules(backend: tokenizers.Tokenizer) -> None:
    """Raises InputError for rules that the library fails at, or that make of a text much more than it was."""
    parts = [backend.normalizer, backend.pre_tokenizer, backend.decoder]
    for part in parts:
        rules = _state(part)
        if _growth(rules) > GROWTH:
            raise InputError(f"its rules make more than {GROWTH} characters of one: {json.dumps(rules)[:80]}")
    for template in _templates(_state(backend.post_processor)):
        texts = [piece["Sequence"]["id"] for piece in template.get("single", []) if "Sequence" in piece]
        if texts != ["A"]:
            raise InputError(f"the template for one text is for {', '.join(texts) or 'none'}; expected A, once")
    unk = getattr(backend.model, "unk_token", None)
    if isinstance(backend.model, (models.WordPiece, models.WordLevel)) and backend.model.token_to_id(unk or "") is None:
        raise InputError(f"the vocabulary lacks {unk}, its token for what it does not know")


def _state(part: object) -> dict:
    """A part of a tokenizer as it stands in tokenizer.json."""
    return json.loads(part.__getstate__()) if part is not None else {}


def _growth(rules: dict) -> float:
    """How many characters the rules make of one, at most."""
    growth = 1.0
    for rule in (*rules.get("normalizers", ()), *rules.get("pretokenizers", ()), *rules.get("decoders", ())):
        growth *= _growth(rule)
    if rules.get("type") == "ByteLevel":
        return growth * 2  # each byte of UTF-8 a character
    if rules.get("type") == "Replace":
        pattern = rules["pattern"].get("String")
        new = len(rules["content"])
        growth *= max(1.0, new / len(pattern) if pattern else new + 1.0)  # an expression may match nothing, everywhere
    if rules.get("type") == "Prepend":
        growth *= 1.0 + len(rules["prepend"])
    return growth


def _templates(rules: dict) -> list[dict]:
    """The templates in a post-processor."""
    if rules.get("type") == "Sequence":
        return [template for rule in rules["processors"] for template in _templates(rule)]
    return [rules] if rules.get("type") == "TemplateProcessing" else []


BUILDERS = {("tokenizer.json",): _whole, ("vocab.txt",): _wordpiece, ("vocab.json", "merges.txt"): _byte_bpe}
