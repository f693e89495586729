"""Tokenizer files as they are found: settings that disagree, tokens in odd places, templates, ends of text.

python -m pytest tests/test_odd_tokenizers.py
"""

import importlib
import json
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from helpers import peer, reviews, small_bert
from tokenizers import models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import minift
from minift.checkpoints.hub import read_tokenizer_of
from minift.data import tokenizer
from minift.data.passages import Passage
from minift.errors import InputError
from minift.tasks import complete

pytestmark = pytest.mark.slow

WORDS = [
    "naive",
    "cafe",
    "Café",
    "café",
    "the",
    "a",
    "b",
    "c",
    "##s",
    "日",
    "本",
    "日本",
    "<",
    ">",
    "|",
    "user",
    "im",
    "end",
    "_",
]
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TEXTS = ["Naïve CAFÉ café Café the a b c 日本 [MASK] <user> b <|im_end|> c", " the a", "the as<|im_end|>b"]
SPECIAL = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def write(folder, **files):
    """Writes `name=content` as NAME.json."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def bert(tmp_path):
    """A folder with BERT's tokenizer.json and vocab.txt, lowercasing, and config.json."""
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    transformers.BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    write(tmp_path, config={"model_type": "bert"}, tokenizer_config={})
    return tmp_path


def make_gpt2(folder, template=None):
    """A byte-level BPE of 256 tokens and <|endoftext|>, </s>, in tokenizer.json; `template` is put around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "</s>"])
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B:1", special_tokens=[("<|endoftext|>", 256), ("</s>", 257)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write(folder, config={"model_type": "gpt2"})
    return folder


def assert_as_transformers(folder, texts=TEXTS):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer_of(folder)
    assert [t.ids for t in ours.encode(texts)] == theirs(texts)["input_ids"]
    pairs = texts[::-1]
    assert [t.ids for t in ours.encode(texts, pairs)] == theirs(texts, pairs)["input_ids"]
    return ours


# tokenizer.json and tokenizer_config.json


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"do_lower_case": False, "strip_accents": True},
        {},
    ],
)
@pytest.mark.parametrize(
    "cls", ["BertTokenizer", "BertTokenizerFast", "ElectraTokenizer", "PreTrainedTokenizerFast", None]
)
def test_the_settings_hold_where_transformers_says_so(bert, settings, cls):
    write(bert, tokenizer_config=settings | ({"tokenizer_class": cls} if cls else {}))
    ours = assert_as_transformers(bert)
    (bert / "saved").mkdir()
    ours.save(bert / "saved")
    write(bert / "saved", config={"model_type": "bert"})
    assert ours.encode(TEXTS) == assert_as_transformers(bert / "saved").encode(TEXTS)


def test_defaults_hold_against_tokenizer_json_too(bert):
    content = json.loads((bert / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    content["added_tokens"] = []  # [MASK] is found in a text all the same
    write(bert, tokenizer=content)
    assert_as_transformers(bert)
    (bert / "config.json").unlink()  # now nothing says that it is BERT's
    assert_as_transformers(bert)


@pytest.mark.parametrize("cls", ["GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", None])
def test_a_prefix_space(tmp_path, cls):
    make_gpt2(tmp_path)
    write(tmp_path, tokenizer_config={"add_prefix_space": True} | ({"tokenizer_class": cls} if cls else {}))
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize("form", ["decoder", "additional", "extra", "named", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_tokens_beside_tokenizer_json(bert, tmp_path, family, form):
    folder = bert if family == "bert" else make_gpt2(tmp_path / "gpt2")
    new, size = ["<|im_end|>", "<user>"], len(BERT_VOCABULARY) if family == "bert" else 258
    old = (
        {}
        if family == "bert"
        else {"256": SPECIAL | {"content": "<|endoftext|>"}, "257": SPECIAL | {"content": "</s>"}}
    )
    files = {
        "decoder": {"tokenizer_config": {"added_tokens_decoder": old | {
            str(size): SPECIAL | {"content": new[0]},
            str(size + 1): SPECIAL | {"content": new[1], "special": False, "normalized": True},
        }}},
        "additional": {"tokenizer_config": {"additional_special_tokens": new}},
        "extra": {"tokenizer_config": {"extra_special_tokens": new}},
        "named": {"tokenizer_config": {"extra_special_tokens": {"end_token": new[0], "user_token": new[1]}}},
        "special_tokens_map": {"special_tokens_map": {"additional_special_tokens": new}},
        "added_tokens": {"added_tokens": {new[1]: size + 1, new[0]: size}},
    }[form]  # fmt: skip
    write(folder, **files)
    ours = assert_as_transformers(folder)
    assert (ours.id(new[0]), ours.id(new[1]), ours.vocab_size) == (size, size + 1, size + 2)


def test_an_id_that_the_vocabulary_does_not_leave(bert):
    write(bert, tokenizer_config={"added_tokens_decoder": {"90": SPECIAL | {"content": "<x>"}}})
    with pytest.raises(InputError, match="gives '<x>' the id 90; the vocabulary leaves 24"):
        tokenizer.read_tokenizer(bert)


@pytest.mark.parametrize("cls", ["BertJapaneseTokenizer", "HerbertTokenizer", "XLMTokenizer"])
def test_a_class_of_other_rules_is_named(bert, tmp_path, cls):
    """Without a tokenizer.json, its ids would be others without a word."""
    (bert / "tokenizer.json").unlink()
    write(bert, tokenizer_config={"tokenizer_class": cls})
    with pytest.raises(InputError, match=f"tokenizer_class is {cls}"):
        tokenizer.read_tokenizer(bert)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    write(tmp_path, vocab={"<|endoftext|>": 0, "a": 1})
    (bert / "vocab.txt").unlink()
    with pytest.raises(InputError, match=f"tokenizer_class is {cls}"):
        tokenizer.read_tokenizer(tmp_path)


def test_a_vocabulary_that_ends_in_empty_lines(bert):
    (bert / "tokenizer.json").unlink()
    (bert / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n\n\n")
    assert assert_as_transformers(bert).vocab_size == len(BERT_VOCABULARY)


def test_special_tokens_of_other_names(bert):
    """CamemBERT's and others' vocab.txt."""
    (bert / "tokenizer.json").unlink()
    names = {
        "cls_token": "<s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    (bert / "vocab.txt").write_text("\n".join([*names.values(), *WORDS]) + "\n")
    write(bert, tokenizer_config=names)
    assert_as_transformers(bert, ["a b zzz<mask> c", "</s>"])


@pytest.mark.parametrize("ends", [{"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("whole", [True, False])
def test_ends_that_the_settings_ask_for(tmp_path, ends, whole):
    make_gpt2(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"] | {"<|endoftext|>": 256}
    if not whole:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        write(tmp_path, vocab=vocabulary)
    write(tmp_path, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"} | ends)
    assert_as_transformers(tmp_path, ["the a", "b"])


def test_dropout_of_merges_is_off(tmp_path):
    make_gpt2(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    content["model"]["vocab"]["ab"] = 258
    content["model"]["merges"] = [["a", "b"]]
    write(tmp_path, tokenizer=content)
    ours = tokenizer.read_tokenizer(tmp_path)
    assert len({tuple(ours.encode(["ab" * 20])[0].ids) for _ in range(10)}) == 1


# special tokens at the seam


@pytest.fixture(params=["<|endoftext|> $A", "$A </s>", "<|endoftext|> $A </s>", None])
def language_model(request, tmp_path):
    """(folder, what its template puts in front) of a small GPT-2 whose eos is </s>."""
    peer(GPT2LMHeadModel, tmp_path / "model", vocab_size=258, eos_token_id=257, bos_token_id=256)
    settings = (tmp_path / "model/config.json").read_text()
    make_gpt2(tmp_path / "model", request.param)
    (tmp_path / "model/config.json").write_text(settings)
    return tmp_path / "model", [256] * (request.param or "").startswith("<|")


def test_specials_stand_once(language_model):
    folder, before = language_model
    model, ours = minift.load(folder, task="complete")
    plain = [ours.encode([text], special=False)[0].ids for text in ("Q", " a", "R", " b")]
    passage = Passage((("Q", False), (" a", True), ("R", False), (" b", True)), "here:1")
    (s,) = complete.encode([passage], model, ours, 40)
    assert s.ids.tolist() == [*before, *plain[0], *plain[1], 257, *plain[2], *plain[3], 257]
    assert s.targets.tolist() == [*plain[1], 257, *plain[3], 257]
    stream = complete.encode([Passage((("QR", True),), "", plain=True)], model, ours, 40)
    assert [*stream[0].ids, *stream[0].targets[-1:]] == [*before, *ours.encode(["QR"], special=False)[0].ids]


def test_a_prompt_is_what_training_saw(language_model, monkeypatch):
    module = importlib.import_module("minift.generation")
    folder, before = language_model
    model, ours = minift.load(folder, task="complete")
    seen = []
    monkeypatch.setattr(module, "continuation", lambda model, ids, *more: seen.append((ids, more)) or [])
    config = minift.GenerateConfig(model=str(folder), prompt="Q")
    assert list(minift.generate(model, ours, config)) == [{"prompt": "Q", "completion": ""}]
    assert seen[0][0] == [*before, *ours.encode(["Q"], special=False)[0].ids] and seen[0][1][2] == [257]


# the end of a text


def declare(folder, **ends):
    """Writes a GPT-2 of 258 tokens that declares its end here and there, and returns the token that is trained."""
    peer(GPT2LMHeadModel, folder, vocab_size=258, bos_token_id=256, eos_token_id=ends.get("config"))
    settings = (folder / "config.json").read_text()
    make_gpt2(folder)
    (folder / "config.json").write_text(settings)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if "generation" in ends:
        write(folder, generation_config={"eos_token_id": ends["generation"]})
    if "tokenizer" in ends:
        write(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "eos_token": ends["tokenizer"]})
    return folder


@pytest.mark.parametrize(
    "ends, want",
    [
        ({"config": 257}, 257),
        ({"config": 256}, 256),
        ({"config": 50256}, 256),  # transformers' default, and no token of this vocabulary
        ({"config": 50256, "tokenizer": "</s>"}, 257),
        ({"config": 256, "generation": 257}, 257),
        ({"config": 256, "generation": [257, 256]}, 256),  # both stop; the tokenizer's own is learned
        ({"config": None, "tokenizer": "</s>"}, 257),
        ({"config": None}, 256),
    ],
)
def test_the_checkpoints_end_is_trained_and_saved(tmp_path, ends, want):
    model, ours = minift.load(declare(tmp_path / "model", **ends), task="complete")
    assert complete.end_of_text(model, ours) == want
    (s,) = complete.encode([Passage((("Q", False), (" a", True)), "")], model, ours, 40)
    assert s.targets[-1] == want
    minift.save(model, ours, tmp_path / "saved")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "saved").generation_config.eos_token_id
    assert want in (theirs if isinstance(theirs, list) else [theirs])
    assert complete.end_of_text(*minift.load(tmp_path / "saved", task="complete")) == want


def test_generation_stops_at_any_of_several_ends(tmp_path):
    model, ours = minift.load(declare(tmp_path / "model", config=256, generation=[257, 256]), task="complete")
    with torch.no_grad():
        model.head.out.weight.zero_()
        model.untie()
        model.body.ln_f.weight.zero_()
        model.body.ln_f.bias.fill_(1)
        model.head.out.weight[257] = 1
    (row,) = minift.generate(model, ours, minift.GenerateConfig(model="x", prompt="Q", max_tokens=5))
    assert row["completion"] == ""


def test_gpt2_with_berts_tokenizer_is_trained(tmp_path, capsys):
    peer(GPT2LMHeadModel, tmp_path / "model", vocab_size=64)
    small_bert(tmp_path / "bert")
    shutil.copy(tmp_path / "bert/vocab.txt", tmp_path / "model")
    write(tmp_path / "model", tokenizer_config={"tokenizer_class": "BertTokenizer"})
    model, ours = minift.load(tmp_path / "model", task="complete")
    model.settings = model.settings | {"eos_token_id": None}
    assert complete.end_of_text(model, ours) == 3  # [SEP]
    (s,) = complete.encode([Passage((("good", False), ("film", True)), "")], model, ours, 40)
    assert s.ids.tolist()[0] == 2 and s.ids.tolist()[-1] == s.targets[-1] == 3 and s.ids.tolist().count(2) == 1


def test_no_end_at_all(tmp_path):
    make_gpt2(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = []
    write(tmp_path, tokenizer=content)
    with pytest.raises(InputError, match="no token that ends a completion; expected an eos_token_id"):
        complete.end_of_text(None, tokenizer.read_tokenizer(tmp_path))


# files that the library fails at


def spoiled(folder, change):
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    write(folder, tokenizer=content, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def template(*pieces):
    """A change of the template for one text."""
    return lambda content: content["post_processor"].update(single=list(pieces))


def token(name, kind=0):
    return {"SpecialToken": {"id": name, "type_id": kind}}


def sequence(name, kind=0):
    return {"Sequence": {"id": name, "type_id": kind}}


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["model"]["vocab"].pop("[UNK]"), "lacks \\[UNK\\], its token"),
        (template(token("[CLS]"), sequence("B")), "template for one text is for B; expected A, once"),
        (template(token("[CLS]")), "template for one text is for none"),
        (template(*[sequence("A")] * 500), "template for one text is for A, A"),
        (lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 40}), "than 256 characters"),
        (lambda c: c.update(normalizer=REPLACE | {"content": "x" * 10**6}), "more than 256 characters of one"),
        (lambda c: c.update(normalizer=REPLACE | {"pattern": {"Regex": ""}, "content": "x" * 999}), "256 characters"),
        (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel",
            "add_prefix_space": False, "trim_offsets": True, "use_regex": False}] * 30}), "more than 256 characters"),
        (lambda c: c["post_processor"]["special_tokens"]["[CLS]"].update(ids=[10**9]), None),
        (template(token("[CLS]", 200), sequence("A")), None),
    ],
)  # fmt: skip
def test_rules_that_fail_or_explode_are_refused(bert, change, words):
    spoiled(bert, change)
    if words:
        with pytest.raises(InputError, match=words):
            tokenizer.read_tokenizer(bert)
    else:  # the model has to say what is too large
        peer(BertModel, bert, vocab_size=64)
        with pytest.raises(InputError, match="has ids up to 1000000000|token type 200; expected below 2"):
            minift.load(bert)


@pytest.mark.parametrize("kind", [2, 5, 200, 2**31])
def test_token_types_beyond_the_model(tmp_path, kind):
    """Of a pair they are known when there is one."""
    peer(BertForSequenceClassification, tmp_path, vocab_size=64)
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    transformers.BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    spoiled(tmp_path, lambda c: c["post_processor"]["pair"].append(token("[SEP]", kind)))
    model, ours = minift.load(tmp_path, task="classify")
    config = minift.PredictConfig(model="x", text="a", pair="b")
    with pytest.raises(InputError, match=f"--text: found a pair of texts, the second of type {kind}; expected single"):
        list(minift.predict(model, ours, config))


def test_one_token_type_and_a_pair(tmp_path):
    small_bert(tmp_path, type_vocab_size=1)
    model, ours = minift.load(tmp_path, task="classify")
    assert len(list(minift.predict(model, ours, minift.PredictConfig(model="x", text="good")))) == 1
    with pytest.raises(InputError, match="the second of type 1; expected single texts"):
        list(minift.predict(model, ours, minift.PredictConfig(model="x", text="good", pair="film")))


def test_a_text_without_tokens(tmp_path):
    make_gpt2(tmp_path / "model")
    spoiled(tmp_path / "model", lambda c: c.update(normalizer=REPLACE | {"pattern": {"Regex": "."}, "content": ""}))
    peer(transformers.GPT2ForSequenceClassification, tmp_path / "peer", vocab_size=258, pad_token_id=0)
    shutil.copy(tmp_path / "model/tokenizer.json", tmp_path / "peer")
    model, ours = minift.load(tmp_path / "peer", task="classify")
    with pytest.raises(InputError, match="--text: the text gives no tokens at all"):
        list(minift.predict(model, ours, minift.PredictConfig(model="x", text="good")))


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
@pytest.mark.parametrize(
    "content",
    ['{"a":' * 5000 + "1" + "}" * 5000, "[" * 10**6, '{"a": ' + "[" * 200 + "]" * 200 + "}"],
    ids=["objects", "open", "lists"],
)
def test_deeply_nested_files(bert, name, content):
    (bert / "tokenizer.json").unlink()
    (bert / name).write_text(content)
    with pytest.raises(InputError, match="nested more than 100 levels deep"):
        tokenizer.read_tokenizer(bert)


@pytest.mark.parametrize("value", ["yes", 1, [], {}])
def test_a_switch_that_is_none(bert, value):
    write(bert, tokenizer_config={"do_lower_case": value})
    with pytest.raises(InputError, match="do_lower_case is .*; expected true or false"):
        tokenizer.read_tokenizer(bert)


def test_training_with_an_odd_tokenizer(tmp_path):
    """A cased setting beside a lowercasing tokenizer.json, from the command's own functions to the saved folder."""
    folder = small_bert(tmp_path / "model")
    write(folder, tokenizer_config={"do_lower_case": False, "tokenizer_class": "BertTokenizer"})
    model, ours = minift.load(folder, task="classify", labels=["blame", "praise"])
    data = reviews(tmp_path / "data.tsv", 8)
    config = minift.TrainConfig(model=str(folder), data=str(data), out=str(tmp_path / "run"), steps=1)
    run = minift.train(model, ours, config)
    assert np.array_equal(
        minift.load(run.model, task="classify")[1].encode(["Good"])[0].ids, ours.encode(["Good"])[0].ids
    )


@pytest.mark.parametrize("name", ["added_tokens_decoder", "additional_special_tokens"])
def test_tokens_that_are_none(bert, name):
    write(bert, tokenizer_config={name: 3})
    with pytest.raises(InputError, match=f"tokenizer_config.json: {name} is 3; expected tokens"):
        tokenizer.read_tokenizer(bert)
