"""`minift new`: a tokenizer and a config.json from nothing but text; `--init random`: weights from nothing but those.

python -m pytest tests/test_new.py
"""

import math

import pytest
import torch
import transformers
from folders import configure, jsonl, names_in, put, weights_in, write
from helpers import WORDS, fails, losses, reviews, works
from transformers import AutoConfig, AutoModel, AutoTokenizer

import minift
from minift.checkpoints.hub import read_tokenizer_of
from minift.models import family_named
from minift.tables import FAMILIES

NEW = "new --data {f}/book.txt --out {out} --vocab 400 --width 32 --layers 2 --heads 2 --positions 30"
LINES = [f"{' '.join(WORDS[i % 7 : i % 7 + 9])}; Füße {i} 日本語 Don't 😀 naïve" for i in range(60)]
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The files of tokens of this module's running texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """book.txt, and a new model of each family, by its name, and one that reads no capitals, lower/."""
    folder = tmp_path_factory.mktemp("new")
    write(folder / "book.txt", *LINES)
    for family in FAMILIES:
        works(f"{NEW} --family {family}", f=folder, out=folder / family)
    works(f"{NEW} --lowercase", f=folder, out=folder / "lower")
    reviews(folder / "classify.tsv", 40)
    write(folder / "complete.jsonl", *[{"prompt": "the film", "completion": f" was {word}"} for word in WORDS])
    write(folder / "fill.jsonl", *({"text": line} for line in LINES))
    return folder


# the folder

ODD = [
    "", "a", "the film", "The Film", "the\r\nfilm\r\n", "the\nfilm\n\n", "  two  spaces ", "\ttabs\t", "don't can't",
    "😀 👩‍👩‍👧 ok", "Füße naïve e\u0301 é", "日本語",
    "a\u200bb\u00adc", "x" * 300, "ﷺ", "\ud7ff\ufffd", "\x00\x1f",
    "[MASK] the [SEP] [cls]", "<mask> x<mask>", "<|endoftext|> y", "<s> a </s>", "##a ## b",
]  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILIES, "lower"])
def test_transformers_loads_it_and_gives_the_same_ids(name, folder):
    """Of odd texts alone, and of pairs of them."""
    theirs = AutoTokenizer.from_pretrained(folder / name)
    ours = read_tokenizer_of(folder / name)
    assert [tokens.ids for tokens in ours.encode(ODD)] == [theirs(text)["input_ids"] for text in ODD]
    pairs = list(zip(ODD[:-1], ODD[1:], strict=True))
    found = ours.encode([one for one, _ in pairs], [other for _, other in pairs])
    assert [tokens.ids for tokens in found] == [theirs(*pair)["input_ids"] for pair in pairs]
    assert len(theirs) == ours.vocab_size and theirs.mask_token_id == ours.mask
    word = min((ours.encode([text], special=False)[0].ids for text in ("plot", " plot")), key=len)
    assert len(word) == 1 and ours.vocab_size <= 400  # it has learned whole words


@families
def test_the_config_is_of_the_size_that_was_asked_for(family, folder):
    """transformers makes a model of it, of the same weights as ours but for the pooler of its own."""
    config = AutoConfig.from_pretrained(folder / family)
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    assert config.model_type == family and config.vocab_size == len(tokenizer)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name), name
    theirs = AutoModel.from_config(config)
    assert type(theirs).__name__ == config.architectures[0]
    model, _ = minift.load(folder / family, init="random")
    assert model.config.longest == 30
    pooler = sum(p.numel() for name, p in theirs.named_parameters() if name.startswith("pooler."))
    assert model.size() == theirs.num_parameters() - pooler
    with torch.no_grad():  # it has room for the longest sequence that was asked for
        assert theirs.eval()(input_ids=torch.full((1, 30), 7)).last_hidden_state.shape == (1, 30, 32)


def test_what_is_in_it_is_said(folder, tmp_path):
    said = works(f"{NEW} --family gpt2", f=folder, out=tmp_path / "m")
    size = minift.load(tmp_path / "m", init="random")[0].size()
    tokens = read_tokenizer_of(tmp_path / "m").vocab_size
    assert f"a gpt2 of {size:,} weights without its head, with {tokens} tokens" in said.out
    assert "minift train --model" in said.err and "--init random" in said.err
    assert names_in(tmp_path / "m") == ["config.json", "minift.json", "tokenizer.json", "tokenizer_config.json"]


def test_sizes(folder, tmp_path):
    """Of the smallest that there can be: bytes alone, one layer, one head, one channel, one position."""
    line = "new --data {f}/book.txt --out {t}/m --family gpt2 --vocab 257 --width 1 --layers 1 --heads 1 --positions 1"
    works(line, f=folder, t=tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_head, config.n_positions) == (257, 1, 1, 1, 1)
    tokenizer = read_tokenizer_of(tmp_path / "m")
    assert (
        tokenizer.decode(tokenizer.encode(["Füße 😀"])[0].ids) == "Füße 😀"
        and len(tokenizer.encode(["😀"])[0].ids) == 4
    )


def test_capitals(folder):
    """Read as small letters only where that was asked for."""
    for name, is_same in (("lower", True), ("bert", False)):
        tokenizer = read_tokenizer_of(folder / name)
        one, other = tokenizer.encode(["the film", "The FILM"])
        assert (one.ids == other.ids) == is_same


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_same_text_gives_the_same_folder(family, folder, tmp_path):
    """However often it is made, and whatever the text is packed in."""
    put(tmp_path / "book.txt.gz", (folder / "book.txt").read_bytes())
    works(f"{NEW} --family {family}", f=folder, out=tmp_path / "again")
    works(f"{NEW.replace('book.txt', 'book.txt.gz')} --family {family}", f=tmp_path, out=tmp_path / "packed")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        want = (folder / family / name).read_bytes()
        assert want == (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


def test_other_files_of_text(folder, tmp_path):
    """The texts of examples, whatever their key, without their labels."""
    put(tmp_path / "d.jsonl", jsonl(*({"review": line, "label": "zzz"} for line in LINES)))
    line = "new --data {t}/d.jsonl --out {t}/{name}"
    fails(line, "no field text", "--columns text=review", t=tmp_path, name="refused")
    works(f"{line} --columns text=review", t=tmp_path, name="m")
    tokens = read_tokenizer_of(tmp_path / "m").backend.get_vocab()
    assert "film" in tokens and "zzz" not in tokens and "z" not in tokens


# what cannot be


def test_a_folder_that_is_taken(folder, tmp_path):
    """Nothing of it is changed: of the user's files, of a new model, of one that was trained."""
    (tmp_path / "own").mkdir()
    put(tmp_path / "own/notes.txt", "mine")
    works(NEW, f=folder, out=tmp_path / "model")
    model, tokenizer = minift.load(tmp_path / "model", init="random")
    minift.save(model, tokenizer, tmp_path / "trained")
    for name in ("own", "model", "trained"):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        fails(NEW, f"--out {tmp_path / name}: is there already", f=folder, out=tmp_path / name)
        assert before == {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    fails(NEW, "is there already", f=folder, out=folder / "book.txt")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        (b"", "found nothing to read"),
        (b" \n\n", "the text has no word to learn a tokenizer from"),
        (b"caf\xe9\n", "expected UTF-8"),
    ],
)
def test_no_text(content, words, tmp_path):
    if content is not None:
        put(tmp_path / "book.txt", content)
    fails(NEW, words, f=tmp_path, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "options, code, words",
    [
        ("--vocab 256 --family gpt2", 1, "--vocab is 256; expected at least 257, the special tokens and the alphabet"),
        ("--vocab 260 --family roberta", 1, "--vocab is 260; expected at least 261"),
        ("--vocab 9", 1, "the special tokens and the alphabet"),
        ("--vocab 0", 2, "--vocab is 0; expected at least 1"),
        ("--width 33", 1, "--width is 33 with --heads 2; expected a number that heads divide"),
        ("--heads 0", 2, "--heads is 0; expected at least 1"),
        ("--layers 2000", 1, "num_hidden_layers is 2000; expected a whole number from 1 to 1,024"),
        ("--positions 0", 2, "--positions is 0; expected at least 1"),
        ("--family nope", 2, "--family is 'nope'; expected one of bert, gpt2, roberta, distilbert"),
    ],
)
def test_sizes_that_cannot_be(options, code, words, folder, tmp_path):
    fails(f"{NEW} {options}", words, code=code, f=folder, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_least_vocabulary_that_is_named_is_enough(folder, tmp_path):
    said = fails(f"{NEW} --vocab 9", "expected at least", f=folder, out=tmp_path / "m")
    least = said.err.split("expected at least ")[1].split(",")[0]
    works(f"{NEW} --vocab {least}", f=folder, out=tmp_path / "m")
    assert AutoConfig.from_pretrained(tmp_path / "m").vocab_size == int(least)


# random weights

TRAIN = (
    "train --init random --model {f}/{family} --task {task} --data {f}/{data} --steps 3 --kernels reference --out {out}"
)
TASKS = {"classify": "classify.tsv", "fill": "fill.jsonl", "complete": "complete.jsonl"}


@pytest.mark.parametrize(
    "family, task",
    [
        ("bert", "classify"),
        ("bert", "fill"),
        ("gpt2", "classify"),
        ("gpt2", "complete"),
        ("roberta", "fill"),
        ("distilbert", "fill"),
    ],
)
def test_it_is_trained_for_every_task(family, task, folder, tmp_path):
    """From new to a model that transformers loads and that is asked."""
    said = works(TRAIN, f=folder, family=family, task=task, data=TASKS[task], out=tmp_path / "run")
    assert "every weight is drawn at random" in said.err and len(losses(tmp_path / "run")) == 3
    model, _ = minift.load(tmp_path / "run", task=task, fresh_head=False)
    theirs = getattr(transformers, model.head.architecture)
    _, info = theirs.from_pretrained(tmp_path / "run/last", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if task != "complete":
        works(
            "eval --task {task} --model {r} --data {f}/{data}",
            f=folder,
            r=tmp_path / "run",
            task=task,
            data=TASKS[task],
        )


def test_the_seed_fixes_the_weights(folder, tmp_path):
    """Same seed, same run, to the bit; another seed, other weights in every matrix."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        line = f"{TRAIN} --seed {seed} --lr 1e-30"
        works(line, f=folder, family="bert", task="fill", data="fill.jsonl", out=tmp_path / name)
    a, b, c = (weights_in(tmp_path / name / "last") for name in "abc")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], c[name]) for name in a if a[name].dim() > 1)
    tokens = read_tokenizer_of(folder / "bert").vocab_size
    assert losses(tmp_path / "a")[0] == pytest.approx(math.log(tokens), abs=0.1)  # a guess among all of them


@pytest.mark.parametrize("spread", [0.02, 0.1])
@families
def test_weights_spread_as_the_config_says(family, spread, folder, tmp_path):
    """Five standard deviations of what chance gives; norms begin at 1, biases at 0, and no two matrices are alike."""
    works(f"{NEW} --family {family}", f=folder, out=tmp_path / "m")
    configure(tmp_path / "m", initializer_range=spread)
    task = "complete" if family == "gpt2" else "fill"
    model, _ = minift.load(tmp_path / "m", task=task, init="random")
    matrices = set()
    for name, p in model.named_parameters():
        hub = model.hub_name(name)
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), hub
            continue
        expected = spread
        if family == "gpt2" and hub.endswith("c_proj.weight"):
            expected /= (2 * 2) ** 0.5  # of what is added to the residual, in each of two layers twice
        n = p.numel()
        assert abs(p.mean().item()) <= 5 * expected / n**0.5, hub
        assert abs(p.std().item() / expected - 1) <= 5 / (2 * n) ** 0.5, hub
        assert family_named(family).init_scale(model.config, name) == pytest.approx(expected)
        matrices.add(p.flatten()[0].item())
    assert len(matrices) == sum(p.dim() > 1 for p in model.parameters())


def test_weights_that_are_there_are_not_read(folder, tmp_path):
    """A folder with a model may be trained from random weights again: it says so, and nothing of the old is in it."""
    works(NEW, f=folder, out=tmp_path / "m")
    model, tokenizer = minift.load(tmp_path / "m", task="fill", init="random", seed=5)
    minift.save(model, tokenizer, tmp_path / "trained")
    again, _ = minift.load(tmp_path / "trained", task="fill", init="random", seed=5)
    other, _ = minift.load(tmp_path / "trained", task="fill", init="random", seed=6)
    read, _ = minift.load(tmp_path / "trained", task="fill", seed=6)
    for (name, p), a, o, r in zip(
        model.named_parameters(), again.parameters(), other.parameters(), read.parameters(), strict=True
    ):
        assert torch.equal(p, a) and torch.equal(p, r), name
        assert p.dim() == 1 or not torch.equal(p, o), name
    assert (
        again.report.notes == ["every weight is drawn at random"] and not again.report.loaded and not read.report.notes
    )


@pytest.mark.parametrize(
    "options, code, words",
    [
        ("--method lora", 1, "--init is 'random' with --method lora, which saves an adapter"),
        ("--method ia3", 1, "--init is 'random' with --method ia3"),
        ("--base nf4", 2, "--base is 'nf4' with --method full"),
        ("--base nf4 --method lora", 2, "--init is 'random' with --base nf4; weights in 4 bits do not learn"),
        ("--init nothing", 2, "--init is 'nothing'; expected one of pretrained, random"),
    ],
)
def test_random_weights_are_not_adapted(options, code, words, folder, tmp_path):
    line = f"{TRAIN} {options}"
    fails(line, words, code=code, f=folder, family="bert", task="classify", data="classify.tsv", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_that_are_for_more_than_a_shape(folder, tmp_path):
    """An adapter, and a model in four bits."""
    works(NEW, f=folder, out=tmp_path / "m")
    model, tokenizer = minift.load(tmp_path / "m", task="classify", init="random")
    minift.save(model, tokenizer, tmp_path / "base")
    adapted, _ = minift.load(tmp_path / "base", task="classify")
    minift.save(minift.adapt(adapted, "lora"), tokenizer, tmp_path / "adapter")
    line = TRAIN.replace("{f}/{family}", "{m}")
    words = "is an adapter, which --init random has no use for"
    places = dict(f=folder, task="classify", data="classify.tsv", out=tmp_path / "run")
    fails(line, words, m=tmp_path / "adapter", **places)
    configure(tmp_path / "base", quantization_config={"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"})
    fails(line, "is a model in few bits, which --init random has no use for", m=tmp_path / "base", **places)
    assert not (tmp_path / "run").exists()


def test_without_it_a_new_model_has_no_weights(folder, tmp_path):
    line = TRAIN.replace("--init random ", "")
    places = dict(f=folder, family="bert", task="classify", data="classify.tsv", out=tmp_path / "run")
    fails(line, "no weights; expected one of model.safetensors", **places)
    fails("eval --model {f}/bert --data {f}/classify.tsv", "no weights", f=folder)
