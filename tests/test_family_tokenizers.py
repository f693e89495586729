"""The tokenizer rules that families declare: RoBERTa's and DistilBERT's beside transformers' own, and a fork's.

python -m pytest tests/test_family_tokenizers.py     (MINIFT_ASSETS=FOLDER: real sentences, and GPT-2's merges)
"""

import json

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import HOSTILE, assert_same
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers

from minift.data.tokenizer import BERT, GPT2, ROBERTA, ByteBPE, read_tokenizer
from minift.errors import InputError

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3; <mask> is the last one, as in roberta-base
SPELT = [
    "<s> a <mask> b</s>", "a<mask>b  <mask>  c", "<pad><unk> <s></s></s>", " <mask>", "<mask> ", "\n<mask>\n",
    "</s>a</s>", "<|endoftext|>", "< mask >", "<mask", "<MASK>", "word " * 2000, "<mask>" * 500,
]  # fmt: skip
TEXTS = [*HOSTILE, *SPELT]


def save_roberta(folder, pieces, merges):
    """vocab.json, merges.txt and config.json, as roberta-base has them; the path of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = [piece for piece in pieces if piece not in (*SPECIALS, "<mask>")]
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *rest, "<mask>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write(folder, config={"model_type": "roberta"})
    return folder


def write(folder, **files):
    """Writes `name=content` as NAME.json."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def gpt2_vocabulary(assets):
    """(pieces in the order of their ids, merges): GPT-2's own, which are RoBERTa's too, with other ids."""
    folder = assets / "weights/tokenizers/gpt2"
    pieces = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return sorted(pieces, key=pieces.get), [line.split() for line in lines if line]


@pytest.fixture(scope="module")
def vocabulary(sentences):
    """The same of a small byte-level BPE, trained on the sentences."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(sentences, trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


@pytest.fixture
def roberta(vocabulary, tmp_path):
    """A folder with vocab.json and merges.txt alone, of model_type roberta."""
    return save_roberta(tmp_path / "roberta", *vocabulary)


def both_of(folder, rules=ROBERTA):
    """(ours, transformers' own) of a folder."""
    return read_tokenizer(folder, rules), transformers.AutoTokenizer.from_pretrained(folder)


def make_whole(folder, form):
    """Adds tokenizer.json in the form that transformers 5 writes, or as roberta-base has it on the hub."""
    if form == "saved":
        transformers.RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)
    elif form == "hub":
        vocab = json.loads((folder / "vocab.json").read_text())
        merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().split("\n")[1:] if line]
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
        backend.add_special_tokens([AddedToken(token, normalized=True) for token in SPECIALS])
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
        backend.save(str(folder / "tokenizer.json"))
        write(folder, tokenizer_config={"model_max_length": 512})


# ---- RoBERTa's -------------------------------------------------------------------------------------------------------


FORMS = ["saved", "hub", "vocabulary alone"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", ["gpt2_vocabulary", "vocabulary"])
def test_sentences_pairs_and_hostile_texts(request, tmp_path, pieces, form, sentences, entailment):
    roberta = save_roberta(tmp_path, *request.getfixturevalue(pieces))
    make_whole(roberta, form)
    both = both_of(roberta)
    assert len(sentences) == 1000
    assert both[0].before == [0] and both[0].types == 1 and both[0].end == 2
    assert_same(both, TEXTS, max_length=16)
    for max_length in (0, 2, 17):
        assert_same(both, sentences, max_length=max_length)
    for max_length in (0, 4, 33):
        assert_same(both, *entailment, max_length)
    assert_same(both, *reversed(entailment), 64)
    for max_length in (0, 16):
        assert_same(both, TEXTS, TEXTS[::-1], max_length)
    ours, theirs = both
    assert ours.vocab_size == len(theirs)
    for tokens in ours.encode([*sentences[:50], *SPELT]):
        assert ours.decode(tokens.ids) == theirs.decode(tokens.ids, skip_special_tokens=True)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from(["<s>", "</s>", "<mask>", " ", "\n", "the"]) | st.characters(codec="utf-8")),
    pair=st.text(st.characters(codec="utf-8"), min_size=1),
    max_length=st.integers(4, 30),
)
def test_any_text(any_text, text, pair, max_length):
    text = "".join(text)
    assert_same(any_text, [text], max_length=max_length)
    assert_same(any_text, [text], [pair], max_length)


@pytest.fixture(scope="module")
def any_text(vocabulary, tmp_path_factory):
    return both_of(save_roberta(tmp_path_factory.mktemp("roberta"), *vocabulary))


FLAGS = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def assert_settings(folder, form, config):
    """That ours is transformers' own with these settings."""
    make_whole(folder, form)
    write(folder, tokenizer_config=config)
    both = both_of(folder)
    texts = [text for text in (*TEXTS, "the end.", "a <user> the . b") if len(text) < 1000]
    assert_same(both, texts)
    assert_same(both, texts, texts[::-1], 6)
    assert both[0].vocab_size == len(both[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cls", ["RobertaTokenizer", "RobertaTokenizerFast", "BartTokenizer"])
def test_classes(roberta, form, cls):
    assert_settings(roberta, form, {"tokenizer_class": cls})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [
    {"add_prefix_space": True},
    {"trim_offsets": False},
    {"cls_token": "</s>", "sep_token": "<s>"},
    {"cls_token": "the", "sep_token": "."},
    {"bos_token": "the", "eos_token": "."},
    {"mask_token": FLAGS | {"content": "<mask>", "lstrip": True}},
    {"mask_token": FLAGS | {"content": "<unk>", "rstrip": True, "single_word": True}},
    {"extra_special_tokens": ["<user>"]},
    {"truncation_side": "left"},
], ids=lambda o: " ".join(o))  # fmt: skip
def test_settings(roberta, form, options):
    assert_settings(roberta, form, options)


def test_what_is_saved_loads_in_transformers(roberta, tmp_path):
    ours = read_tokenizer(roberta, ROBERTA)
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    write(saved, config={"model_type": "roberta"})
    (saved / "vocab.json").unlink()
    (saved / "merges.txt").unlink()
    both = both_of(saved)
    assert_same(both, TEXTS)
    assert both[0].encode(TEXTS, TEXTS[::-1]) == ours.encode(TEXTS, TEXTS[::-1])


def test_offsets_are_those_of_transformers(roberta):
    """They are read by nobody today, but are written into tokenizer.json."""
    for options in ({}, {"trim_offsets": False}, {"add_prefix_space": True}):
        write(roberta, tokenizer_config=options)
        ours, theirs = both_of(roberta)
        for text in (" the  film ", "a <mask> b"):
            expected = theirs(text, return_offsets_mapping=True)["offset_mapping"]
            assert ours.backend.encode(text).offsets == expected


def test_tokens_that_are_lacking(tmp_path):
    save_roberta(tmp_path, ["a", "b"], [])
    write(tmp_path, tokenizer_config={"sep_token": "<sep>"})
    with pytest.raises(InputError, match="the vocabulary lacks <sep>"):
        read_tokenizer(tmp_path, ROBERTA)
    write(tmp_path, tokenizer_config={"trim_offsets": "no"})
    with pytest.raises(InputError, match="trim_offsets is no; expected true or false"):
        read_tokenizer(tmp_path, ROBERTA)


# ---- DistilBERT's ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("cls", ["DistilBertTokenizer", "DistilBertTokenizerFast", "BertTokenizer", None])
def test_distilbert(assets, tmp_path, sentences, entailment, whole, cls):
    source = assets / "weights/tokenizers/bert-base-uncased"
    for name in ["vocab.txt", *["tokenizer.json"] * whole]:
        (tmp_path / name).write_bytes((source / name).read_bytes())
    write(tmp_path, config={"model_type": "distilbert"}, tokenizer_config={"tokenizer_class": cls} if cls else {})
    both = both_of(tmp_path, BERT)
    assert_same(both, [*sentences, *TEXTS], max_length=64)
    assert_same(both, *entailment, 64)


# ---- which rules hold ------------------------------------------------------------------------------------------------


def test_the_class_that_the_files_name_goes_before_the_family(roberta):
    assert read_tokenizer(roberta, ROBERTA).encode(["a"])[0].ids[0] == 0
    assert read_tokenizer(roberta, GPT2).encode(["a"])[0].ids == read_tokenizer(roberta).encode(["a"])[0].ids
    write(roberta, tokenizer_config={"tokenizer_class": "RobertaTokenizer"})
    named = read_tokenizer(roberta, GPT2).encode(TEXTS)
    assert named == read_tokenizer(roberta, ROBERTA).encode(TEXTS)
    write(roberta, tokenizer_config={}, config={"model_type": "gpt2", "tokenizer_class": "RobertaTokenizer"})
    assert read_tokenizer(roberta, GPT2).encode(TEXTS) == named


def join_own(sep, cls, settings):
    """<s> a </s> b </s>, of types 0 and 1."""
    return processors.TemplateProcessing(
        single=[f"{cls[0]}:0", "$A:0", f"{sep[0]}:0"],
        pair=[f"{cls[0]}:0", "$A:0", f"{sep[0]}:0", "$B:1", f"{sep[0]}:1"],
        special_tokens=[sep, cls],
    )


def test_rules_of_a_fork(roberta):
    """A family brings its own rules as a value; they hold for its class, and where none is named."""
    own = ByteBPE(classes=("Own",), tokens=ROBERTA.tokens, join=join_own)
    bare = read_tokenizer(roberta, GPT2).encode(["a", "b"])
    a, b = (tokens.ids for tokens in bare)
    for declared in ({}, {"tokenizer_class": "OwnTokenizer"}, {"tokenizer_class": "OwnTokenizerFast"}):
        write(roberta, tokenizer_config=declared)
        (tokens,) = read_tokenizer(roberta, own).encode(["a"], ["b"])
        assert tokens.ids == [0, *a, 2, *b, 2] and tokens.types == [0, 0, 0, 1, 1]
    with pytest.raises(InputError, match="tokenizer_class is OwnTokenizerFast, whose rules are not known here"):
        read_tokenizer(roberta, ROBERTA)
