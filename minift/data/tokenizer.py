"""Text to token ids: WordPiece (BERT) and byte-level BPE (GPT-2, RoBERTa).

A tokenizer is made of whatever a checkpoint has: tokenizer.json, vocab.txt, or vocab.json and merges.txt. Its `Rules`
say the rest. They are chosen as transformers 5 does: by the tokenizer_class that the settings name, else they are those
of the model's family. Where tokenizer.json disagrees with them or with tokenizer_config.json, it gives way. Of a class
that nobody knows here, tokenizer.json is taken as it is.

Truncation is done here and not by the library. The library keeps what it cuts off: for a pair of long texts, every
combination of their pieces (3.7 GB for two texts of 2,000 tokens cut to 16); and its truncation is a state of the
tokenizer, which one call would leave to the next.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tokenizers
from tokenizers import AddedToken, Encoding, decoders, models, normalizers, pre_tokenizers, processors

from ..config import parse_json
from ..errors import InputError

BATCH = 1000  # texts handed over at once: the library's encodings take about 100 bytes per token while they live
GROWTH = 256  # most characters that rules may make of one; "ﷺ" becomes 18 by Unicode's own
LARGEST = 10**7  # ids of tokens are below this
ENDS = ("<|endoftext|>", "[SEP]")  # what ends a text where no eos_token is declared
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRAS = ("additional_special_tokens", "extra_special_tokens")
SWITCHES = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space", "trim_offsets")


@dataclass(frozen=True, slots=True)
class Tokens:
    ids: list[int]
    types: list[int]  # segment: 0 for the text, 1 for its pair
    truncated: bool


class Tokenizer:
    """Text to token ids and back.

    vocab_size: the largest id + 1, added tokens and those of the template included. types: the same of the token types
    of a text alone. before, behind: the special tokens around a text. special: the ids of all special tokens.
    end, mask: the id of what ends a text, and of what stands for a hidden word, or None.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, files: dict[str, bytes], side: str, end: str | None, mask: str | None
    ):
        backend.no_truncation()  # of the file's own: MiniLM's cuts at 128 and pads to 128
        backend.no_padding()
        self.backend = backend
        self.side = side  # of a text where it is cut, as its truncation_side says
        self.files = files  # name -> content, as the checkpoint had them
        probe = backend.encode("a")
        parts = [*probe.sequence_ids, 0]
        self.before = probe.ids[: parts.index(0)]
        self.behind = probe.ids[len(self.before) + probe.sequence_ids.count(0) :]
        self.special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.end = backend.token_to_id(end) if end else None
        self.mask = backend.token_to_id(mask) if mask else None
        self.types = max(probe.type_ids, default=0) + 1
        self.vocab_size = max(*backend.get_vocab().values(), *probe.ids, -1, -1) + 1

    def encode(
        self, texts: list[str], pairs: list[str | None] | None = None, max_length: int = 0, special: bool = True
    ) -> list[Tokens]:
        """The token ids of texts, each alone or with its pair.

        max_length: most tokens per text, special ones included; the longer of a pair is cut first. 0: no limit.
        special: whether to put the special tokens around each text.
        Raises InputError if the special tokens alone exceed max_length, or if a text is not valid Unicode.
        """
        pairs = pairs or [None] * len(texts)
        has_pair = any(pair is not None for pair in pairs)
        least = self.backend.num_special_tokens_to_add(has_pair)
        if max_length < 0 or 0 < max_length < least:
            raise InputError(f"--max-length {max_length}: expected at least {least}, the special tokens alone")
        inputs = []
        for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
            _check_unicode(i, text + (pair or ""))
            inputs.append(text if pair is None else (text, pair))
        tokens = []
        for start in range(0, len(inputs), BATCH):
            try:
                encodings = self.backend.encode_batch(inputs[start : start + BATCH], add_special_tokens=special)
            except Exception as error:  # the library raises no narrower one
                raise InputError(f"texts {start} to {start + BATCH}: the tokenizer fails ({error})") from error
            tokens += [_cut(encoding, max_length, self.side) for encoding in encodings]
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

    def digest(self) -> str:
        """A hash of all that decides which tokens a text has: rules, vocabulary, added tokens, the library."""
        rules = f"{tokenizers.__version__} {self.backend.to_str()}"
        return hashlib.sha256(rules.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint's own tokenizer files, and a tokenizer.json if it had none."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def _check_unicode(i: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, as JSON's "\ud83d"; the library says "must be str"
        raise InputError(f"text {i} has the lone surrogate {text[error.start]!r}; expected valid Unicode") from None


def _cut(encoding: Encoding, max_length: int, side: str) -> Tokens:
    """Drop tokens at the ends of the text and of its pair, and no special ones, until max_length are left.

    side: "left" drops them at the beginnings.
    """
    ids = encoding.ids
    types = encoding.type_ids
    if not max_length or len(ids) <= max_length:
        return Tokens(ids, types, truncated=False)
    parts = encoding.sequence_ids  # 0 for the text, 1 for its pair, None for special tokens
    kept = [at for at, part in enumerate(parts) if part is None]
    for text, room in enumerate(_longest_first(parts.count(0), parts.count(1), max_length - len(kept))):
        places = [at for at, part in enumerate(parts) if part == text]
        kept += places[len(places) - room :] if side == "left" else places[:room]
    kept.sort()
    return Tokens([ids[at] for at in kept], [types[at] for at in kept], truncated=True)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths after cutting, as the library's strategy "longest_first" (tokenizers, src/utils/truncation.rs)."""
    short = min(first, second, room // 2)
    if first <= second:
        return short, min(second, room - short)
    return min(first, room - short), short


# ---- rules -----------------------------------------------------------------------------------------------------------

Token = tuple[str, int]  # a special token and its id
Join = Callable[[Token, Token, dict], object]  # (sep, cls, settings) -> one of tokenizers.processors


@dataclass(frozen=True)
class WordPiece:
    """The rules of a tokenizer that splits words into the pieces of a vocab.txt.

    classes: the tokenizer_class values they stand for, without "Tokenizer" and "Fast".
    tokens: the special tokens, by the setting that may name others. join: what is put around a text, and a pair.
    """

    classes: tuple[str, ...]
    tokens: dict[str, str]
    join: Join
    files: ClassVar[tuple[str, ...]] = ("vocab.txt",)

    def build(self, files: dict[str, bytes], settings: dict) -> tokenizers.Tokenizer:
        """From vocab.txt: one token per line, the id is the number of the line."""
        lines = files["vocab.txt"].decode().rstrip("\r\n").split("\n")  # splitlines() would split at U+2028, a token
        vocab = {line.removesuffix("\r"): i for i, line in enumerate(lines)}
        special = _special_tokens(self, settings)
        if lacking := [special[key] for key in ("unk_token", "cls_token", "sep_token") if special[key] not in vocab]:
            raise InputError(f"vocab.txt lacks {', '.join(lacking)}")
        return tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special["unk_token"]))

    def follow(self, backend: tokenizers.Tokenizer, settings: dict) -> None:
        """Makes `backend` what the class makes of the settings, whatever tokenizer.json said."""
        if not isinstance(backend.model, models.WordPiece):
            return
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),  # None: as lowercase
            lowercase=settings.get("do_lower_case", True),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        backend.post_processor = _joined(self, backend, settings)


@dataclass(frozen=True)
class ByteBPE:
    """The rules of a tokenizer that merges bytes by a vocab.json and a merges.txt.

    classes, tokens, join: as WordPiece has them. Without `join` nothing is put around a text, unless the settings ask
    for it by add_bos_token and add_eos_token, or tokenizer.json has it.
    """

    classes: tuple[str, ...]
    tokens: dict[str, str]
    join: Join | None = None
    files: ClassVar[tuple[str, ...]] = ("vocab.json", "merges.txt")

    def build(self, files: dict[str, bytes], settings: dict) -> tokenizers.Tokenizer:
        """From vocab.json and merges.txt."""
        vocab = _json(files, "vocab.json")
        largest = max((i for i in vocab.values() if isinstance(i, int)), default=0)
        if largest >= LARGEST:  # the library counts all that are missing below
            raise InputError(f"vocab.json has the id {largest}; expected below {LARGEST:,}")
        lines = files["merges.txt"].decode().split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        if settings.get("add_bos_token") or settings.get("add_eos_token"):
            backend.post_processor = _ends(backend, _special_tokens(self, settings), settings)
        return backend

    def follow(self, backend: tokenizers.Tokenizer, settings: dict) -> None:
        """Makes `backend` what the class makes of the settings, whatever tokenizer.json said."""
        if not isinstance(backend.model, models.BPE):
            return
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))
        backend.decoder = decoders.ByteLevel()
        if self.join:
            backend.post_processor = _joined(self, backend, settings)


Rules = WordPiece | ByteBPE


def join_bert(sep: Token, cls: Token, settings: dict) -> processors.BertProcessing:
    """[CLS] a [SEP], [CLS] a [SEP] b [SEP]; b and what follows it are of type 1."""
    return processors.BertProcessing(sep, cls)


def join_roberta(sep: Token, cls: Token, settings: dict) -> processors.RobertaProcessing:
    """<s> a </s>, <s> a </s></s> b </s>; all are of type 0."""
    trim_offsets = settings.get("trim_offsets") is not False
    return processors.RobertaProcessing(sep, cls, trim_offsets, bool(settings.get("add_prefix_space")))


BERT = WordPiece(
    classes=("Bert", "DistilBert", "Electra", "MobileBert", "LayoutLM", "Lxmert", "ConvBert", "SqueezeBert"),
    tokens={
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    join=join_bert,
)
GPT2 = ByteBPE(
    classes=("GPT2",),
    tokens={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
)
ROBERTA = ByteBPE(
    classes=("Roberta", "Longformer", "Bart", "LED"),
    tokens={
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    },
    join=join_roberta,
)
KNOWN = (BERT, GPT2, ROBERTA)


def _special_tokens(rules: Rules | None, settings: dict) -> dict[str, str]:
    """Each special token by the name of its setting: what the settings say, else what the rules say."""
    tokens = dict(rules.tokens) if rules else {}
    for key in NAMED:
        if token := _content(settings.get(key)):
            tokens[key] = token
    return tokens


def _joined(rules: Rules, backend: tokenizers.Tokenizer, settings: dict) -> object:
    """The post-processor of rules that put special tokens around a text."""
    special = _special_tokens(rules, settings)
    ids = {special[key]: backend.token_to_id(special[key]) for key in ("cls_token", "sep_token")}
    if lacking := [token for token, id in ids.items() if id is None]:
        raise InputError(f"the vocabulary lacks {', '.join(lacking)}")
    sep = special["sep_token"]
    cls = special["cls_token"]
    return rules.join((sep, ids[sep]), (cls, ids[cls]), settings)


def _ends(backend: tokenizers.Tokenizer, special: dict[str, str], settings: dict) -> processors.TemplateProcessing:
    """What add_bos_token and add_eos_token put around a text, where there is no tokenizer.json to say so."""
    bos = [special["bos_token"]] if settings.get("add_bos_token") else []
    eos = [special["eos_token"]] if settings.get("add_eos_token") else []
    ids = {token: backend.token_to_id(token) for token in bos + eos}
    for token, id in ids.items():
        if id is None:
            raise InputError(f"add_bos_token or add_eos_token is true, but the vocabulary lacks {token}")
    first = [*(f"{token}:0" for token in bos), "$A:0", *(f"{token}:0" for token in eos)]
    second = [*(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)]
    return processors.TemplateProcessing(single=first, pair=first + second, special_tokens=list(ids.items()))


# ---- loading ---------------------------------------------------------------------------------------------------------

WHOLE = ("tokenizer.json",)
SOURCES = (WHOLE, WordPiece.files, ByteBPE.files)  # the first of these that a folder has is read
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES = (*WHOLE, *WordPiece.files, *ByteBPE.files, *BESIDE)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any(all((folder / name).is_file() for name in names) for names in SOURCES)


def require_tokenizer(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    """The tokenizer of a model, which a command that reads text cannot do without. Raises InputError."""
    if tokenizer is None:
        raise InputError(f"{source}: no tokenizer; expected tokenizer.json, vocab.txt, or vocab.json and merges.txt")
    return tokenizer


def read_tokenizer(folder: str | Path, rules: Rules | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder. All is read now, so the folder may go. Raises InputError.

    rules: what the model's family declares; they hold where the folder names no tokenizer_class.
    """
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    names = next((names for names in SOURCES if files.keys() >= set(names)), None)
    if names is None:
        raise InputError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt")
    try:
        settings = _settings(files)
        rules = _choose_rules(settings, folder / "config.json", names, rules)
        return _make_tokenizer(files, names, settings, rules)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises no narrower one, and its panics are no Exception
        raise InputError(f"{folder}: no tokenizer can be made of {' and '.join(names)} ({error})") from error


def _json(files: dict[str, bytes], name: str) -> dict:
    """The object in a JSON file; a file that is not there is an empty one."""
    value = parse_json(files.get(name, b"{}"), name)
    if not isinstance(value, dict):
        raise InputError(f"{name} does not hold a JSON object")
    return value


def _settings(files: dict[str, bytes]) -> dict:
    """tokenizer_config.json, with what special_tokens_map.json adds where it names no added tokens itself."""
    settings = _json(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _json(files, "special_tokens_map.json")
    kinds = dict.fromkeys(SWITCHES, (bool, "true or false")) | dict.fromkeys(EXTRAS, (list | dict, "tokens"))
    kinds["added_tokens_decoder"] = dict, "tokens"
    for name, (kind, expected) in kinds.items():
        if not isinstance(settings.get(name), kind | None):
            raise InputError(f"tokenizer_config.json: {name} is {str(settings[name])[:80]}; expected {expected}")
    return settings


def _choose_rules(settings: dict, config: Path, names: tuple[str, ...], own: Rules | None) -> Rules | None:
    """The rules for files of these names; None where tokenizer.json is taken as it is.

    own: what holds where no tokenizer_class is named, in tokenizer_config.json or else in config.json.
    """
    model = parse_json(config.read_bytes(), config) if config.is_file() else {}
    declared = settings.get("tokenizer_class")
    if declared is None and isinstance(model, dict):
        declared = model.get("tokenizer_class")
    if declared is None and names == WHOLE:
        return own
    known = [rules for rules in (own, *KNOWN) if rules]
    if declared is None:
        return next(rules for rules in known if rules.files == names)
    name = str(declared).removesuffix("Fast").removesuffix("Tokenizer")
    if name == "BertJapanese":
        raise InputError("tokenizer_class is BertJapaneseTokenizer, which splits words by MeCab; that is not supported")
    rules = next((rules for rules in known if name in rules.classes), None)
    if names != WHOLE and (rules is None or rules.files != names):
        raise InputError(f"tokenizer_class is {declared}, whose rules are not known here; expected a tokenizer.json")
    return rules


def tokenizer_of(backend: tokenizers.Tokenizer, settings: dict, rules: Rules) -> Tokenizer:
    """A tokenizer, with its files, of a vocabulary that was just learned. settings: its tokenizer_config.json."""
    rules.follow(backend, settings)
    files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
    return _make_tokenizer(files, WHOLE, settings, rules)


def _make_tokenizer(files: dict[str, bytes], names: tuple[str, ...], settings: dict, rules: Rules | None) -> Tokenizer:
    if names == WHOLE:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    else:
        backend = rules.build(files, settings)
    if isinstance(backend.model, models.BPE):
        backend.model.dropout = None  # else a text would have other tokens each time
    if rules:
        rules.follow(backend, settings)
    special = _special_tokens(rules, settings)
    _add_tokens(backend, files, settings, special)
    _check_rules(backend)
    if names != WHOLE:
        files["tokenizer.json"] = backend.to_str(pretty=True).encode()
    side = settings.get("truncation_side") or (backend.truncation or {}).get("direction", "right")
    if side not in ("left", "right"):
        raise InputError(f"truncation_side is {str(side)[:80]}; expected left or right")
    ends = (special.get("eos_token"), *ENDS, special.get("sep_token"))
    end = next((token for token in ends if token and backend.token_to_id(token) is not None), None)
    return Tokenizer(backend, files, side, end, special.get("mask_token"))


def _add_tokens(
    backend: tokenizers.Tokenizer, files: dict[str, bytes], settings: dict, special: dict[str, str]
) -> None:
    """Adds the tokens that stand beside the vocabulary: in three places, of three ages.

    added_tokens_decoder of tokenizer_config.json; else added_tokens.json; and additional_special_tokens. special: those
    with a name, which are in the vocabulary and are to be found in a text.
    """
    declared = settings.get("added_tokens_decoder")
    place = "tokenizer_config.json"
    if declared is None:
        declared = {i: token for token, i in _json(files, "added_tokens.json").items()}
        place = "added_tokens.json"
    by_id = {int(i): token for i, token in declared.items()}
    for i, token in sorted(by_id.items()):
        if isinstance(token, dict):
            token = AddedToken(**token)
        else:
            token = AddedToken(token, normalized=True, special=token in special.values())
        if token.special:
            backend.add_special_tokens([token])
        else:
            backend.add_tokens([token])
        left = backend.token_to_id(token.content)
        if left != i:
            raise InputError(f"{place} gives {token.content!r} the id {i}; the vocabulary leaves {left}")
    new = []
    for key in EXTRAS:
        extras = settings.get(key) or []
        if isinstance(extras, dict):
            extras = extras.values()
        new += [AddedToken(_content(token), special=True, normalized=False) for token in extras]
    for key, token in special.items():
        if backend.token_to_id(token) is not None:
            new.append(_named_token(token, settings.get(key)))
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([token for token in new if token.content not in there])


def _named_token(token: str, declared: object) -> AddedToken:
    """A special token with what its setting says of the spaces beside it: RoBERTa's <mask> takes those before it."""
    if not isinstance(declared, dict):
        return AddedToken(token, special=True)
    flags = {key: bool(declared.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token, special=True, **flags)


def _content(token: object) -> str | None:
    """A special token's text: written as it is, or as an object with more about it."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise InputError(f"a special token is {str(token)[:80]}; expected a string")
    return content


def _check_rules(backend: tokenizers.Tokenizer) -> None:
    """Raises InputError for rules that the library fails at, or that make of a text much more than it was."""
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
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
