"""Alone: pytest tests/test_tokenizer.py   (MINIFT_ASSETS=FOLDER, for tokenizer files and sentences; else most skip)"""

import json
import resource
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minift.data.tokenizer import Tokens, read_tokenizer
from minift.errors import InputError

FOLDERS = {"bert": "tokenizers/bert-base-uncased", "minilm": "all-MiniLM-L6-v2", "gpt2": "tokenizers/gpt2"}
HOSTILE = [
    "", " ", "   ", "\n", "\r\n\t \n", "   leading and trailing   ", "line\u2028sep\x85", "a\u00a0b",
    "a\x00b", "\x01\x02\x7f\x1b[0m\x9f", "\ufeffbom", "\ufffd", "\u200b\u200d", "\U0010ffff\ue000",
    "naïve café", "nai\u0308ve cafe\u0301 e\u0301\u0302\u0303\u0304", "ﬁ Å ß İ ǅ",
    "日本語の文 中文字符 한국어", "𠀀𠮷 mixed漢字text", "ไทย हिन्दी",
    "😀👍🏽", "👩‍👩‍👧‍👦🏳️‍🌈", "שלום עולם مرحبا \u202eabc\u202c",
    "a" * 100, "a" * 101, "x" * 10_000, "日" * 10_000, "!?" * 5_000,  # WordPiece gives up on words above 100
    "[CLS] [MASK][SEP] [UNK] [PAD]", "<|endoftext|>a<|endoftext|>", "##ing don't I'LL 1,234.56 http://a.b/c?d=e",
]  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS)
def both(request, assets):
    """(our tokenizer, transformers' own)"""
    transformers = pytest.importorskip("transformers")
    folder = assets / "weights" / FOLDERS[request.param]
    return read_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bert(assets):
    return read_tokenizer(assets / "weights" / FOLDERS["bert"])


@pytest.fixture(scope="module")
def gpt2(assets):
    return read_tokenizer(assets / "weights" / FOLDERS["gpt2"])


def assert_same(both, texts, pairs=None, max_length=0):
    ours, theirs = both
    limit = {"truncation": True, "max_length": max_length} if max_length else {}
    found, expected = ours.encode(texts, pairs, max_length), theirs(texts, pairs, return_token_type_ids=True, **limit)
    assert [t.ids for t in found] == expected["input_ids"]
    assert [t.types for t in found] == expected["token_type_ids"]


# ---- equal to transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [0, 2, 17, 128])
def test_sentences(both, sentences, max_length):
    assert len(sentences) == 1000
    assert_same(both, sentences, max_length=max_length)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [0, 3, 4, 5, 16, 33, 64, 128])
def test_pairs(both, entailment, max_length):
    assert_same(both, *entailment, max_length)
    assert_same(both, *reversed(entailment), max_length)  # the second is the longer one now


def test_hostile_texts(both):
    for max_length in (0, 16):
        assert_same(both, HOSTILE, max_length=max_length)
        assert_same(both, HOSTILE, HOSTILE[::-1], max_length)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    pair=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    max_length=st.integers(3, 40),
)
def test_any_text(both, text, pair, max_length):
    assert_same(both, [text], max_length=max_length)
    assert_same(both, [text], [pair], max_length)


def test_vocabulary(both):
    ours, theirs = both
    assert ours.vocab_size == len(theirs)
    for token in ("the", "##ing", "Ġthe", "[CLS]", "<|endoftext|>", "no such token"):
        assert ours.id(token) == theirs.get_vocab().get(token)


def test_decode(both, sentences):
    ours, theirs = both
    for tokens in ours.encode(sentences[:50]):
        assert ours.decode(tokens.ids) == theirs.decode(tokens.ids, skip_special_tokens=True)


# ---- known answers ---------------------------------------------------------------------------------------------------


def test_known_ids(bert, gpt2):
    assert gpt2.encode(["hello world"]) == [Tokens([31373, 995], [0, 0], False)]
    assert gpt2.decode([31373, 995]) == "hello world" and gpt2.vocab_size == 50257 and gpt2.id("<|endoftext|>") == 50256
    pair = Tokens([101, 7592, 2088, 102, 7632, 102], [0, 0, 0, 0, 1, 1], False)
    assert bert.encode(["hello world"], ["hi"]) == [pair]
    assert bert.decode([101, 7592, 2088, 102]) == "hello world" and bert.encode([]) == []


def test_pairs_may_lack_here_and_there(bert):
    mixed = bert.encode(["a b", "a b"], [None, "c"], max_length=4)
    assert mixed == bert.encode(["a b"]) + bert.encode(["a b"], ["c"], max_length=4)
    assert [t.truncated for t in mixed] == [False, True]


def test_truncated_says_whether_anything_was_cut(bert):
    truncated = {n: bert.encode(["one two three"], max_length=n)[0].truncated for n in (2, 4, 5, 6, 0)}
    assert truncated == {2: True, 4: True, 5: False, 6: False, 0: False}


def test_no_call_leaves_anything_to_the_next(both):
    ours, _ = both
    before = ours.encode(["a b c d e f g"], ["h i j"])
    assert len(ours.encode(["a b c d e f g"], ["h i j"], max_length=5)[0].ids) == 5
    assert ours.encode(["a b c d e f g"], ["h i j"]) == before
    assert len(ours.encode(["word " * 300])[0].ids) >= 300  # MiniLM's file truncates to 128
    assert len(ours.encode(["word"])[0].ids) <= 3  # ... and pads


@pytest.mark.slow
def test_two_long_texts_cost_no_more_than_their_length(bert):
    """The library's own truncation takes 3.7 GB for this pair: it keeps all combinations of the pieces cut off."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(bert.encode(["good film " * 1000], ["bad film " * 1000], max_length=16)[0].ids) == 16
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


# ---- from older files ------------------------------------------------------------------------------------------------


def copy(source, target, *names):
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(source / name, target / name)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind, names", [("bert", ["vocab.txt"]), ("gpt2", ["vocab.json", "merges.txt"])])
def test_vocabulary_files_alone_make_the_same_tokenizer(assets, tmp_path, sentences, entailment, kind, names):
    source = assets / "weights" / FOLDERS[kind]
    whole, built = read_tokenizer(source), read_tokenizer(copy(source, tmp_path / "old", *names))
    for args in ((sentences,), (HOSTILE,), entailment, (*entailment, 20)):
        assert built.encode(*args) == whole.encode(*args)
    assert (built.vocab_size, built.id("the")) == (whole.vocab_size, whole.id("the"))
    ids = whole.encode(sentences[:1])[0].ids
    assert built.decode(ids) == whole.decode(ids)
    built.save(tmp_path)  # with a tokenizer.json, which they did not have
    assert read_tokenizer(tmp_path).encode(sentences) == whole.encode(sentences)


@pytest.mark.parametrize("options", [
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": True, "tokenize_chinese_chars": False},
])  # fmt: skip
def test_bert_options_are_those_of_tokenizer_config(assets, tmp_path, options):
    transformers = pytest.importorskip("transformers")
    copy(assets / "weights" / FOLDERS["bert"], tmp_path, "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **options}))
    assert_same((read_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)), HOSTILE)


def test_gpt2_prefix_space_and_added_tokens(assets, tmp_path, gpt2):
    transformers = pytest.importorskip("transformers")
    copy(assets / "weights" / FOLDERS["gpt2"], tmp_path, "vocab.json", "merges.txt")
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 50258, "<user>": 50257}))
    ours = read_tokenizer(tmp_path)
    assert ours.vocab_size == 50259 and ours.encode(["hello"])[0].ids == gpt2.encode([" hello"])[0].ids
    assert_same((ours, transformers.AutoTokenizer.from_pretrained(tmp_path)), [*HOSTILE, "a<user> b <pad>"])
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 60000}')
    with pytest.raises(InputError, match="added_tokens.json gives '<pad>' the id 60000; the vocabulary leaves 50257"):
        read_tokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOLDERS)
def test_what_is_saved_loads_in_transformers(assets, tmp_path, sentences, kind):
    transformers = pytest.importorskip("transformers")
    source = copy(assets / "weights" / FOLDERS[kind], tmp_path / "source", "tokenizer.json")
    if kind != "gpt2":
        names = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
        copy(assets / "weights" / FOLDERS[kind], source, *names)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    ours = read_tokenizer(source)
    shutil.rmtree(source)
    ours.encode(sentences, max_length=5)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == files
    assert_same(
        (read_tokenizer(tmp_path / "saved"), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")), sentences
    )


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_no_tokenizer_lists_what_was_looked_for(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")  # without its merges.txt
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(InputError) as e:
            read_tokenizer(folder)
        assert "expected tokenizer.json, or vocab.txt, or vocab.json and merges.txt" in str(e.value)
        assert str(folder) in str(e.value)


@pytest.mark.parametrize("files, named", [
    ({"tokenizer.json": b"{"}, "tokenizer.json"),
    ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json"),
    ({"tokenizer.json": b'{"model": 1}'}, "tokenizer.json"),
    ({"vocab.txt": b"a\n\xff\n"}, "vocab.txt"),
    ({"vocab.txt": b"[UNK]\na\n"}, "vocab.txt lacks [CLS], [SEP]"),
    ({"vocab.txt": b"[UNK]\n[CLS]\n[SEP]\n", "tokenizer_config.json": b"[1]"}, "tokenizer_config.json"),
    ({"vocab.json": b"{", "merges.txt": b""}, "vocab.json"),
    ({"vocab.json": b'{"a": "x"}', "merges.txt": b""}, "vocab.json and merges.txt"),
    ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b c\n"}, "vocab.json and merges.txt"),
    ({"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "vocab.json and merges.txt"),
])  # fmt: skip
def test_corrupt_files_are_named(tmp_path, files, named):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as e:
        read_tokenizer(tmp_path)
    assert named in str(e.value) and str(tmp_path) in str(e.value)


def test_max_length_has_room_for_the_special_tokens(bert, gpt2):
    cases = (bert, None, 1, 2), (bert, ["b"], 2, 3), (bert, None, -1, 2), (gpt2, None, -5, 0)
    for tokenizer, pairs, max_length, least in cases:
        with pytest.raises(InputError, match=f"--max-length {max_length}: expected at least {least}"):
            tokenizer.encode(["a"], pairs, max_length)
    assert bert.encode(["a"], ["b"], 3)[0].ids == [101, 102, 102]


def test_half_a_surrogate_pair_names_the_text(bert):
    for texts, pairs in ((["a", "b\ud800"], None), (["a", "b"], [None, "\udfff"])):
        with pytest.raises(InputError, match="text 1 has the lone surrogate"):
            bert.encode(texts, pairs)
