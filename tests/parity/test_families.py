"""Families that use BERT's layers again, beside transformers: numbers, files, adapters, commands.

python -m pytest tests/parity/test_families.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from folders import configure, refuse, rewrite, weights_in, write
from helpers import (
    BERT,
    VOCABULARY,
    WORDS,
    losses,
    metrics,
    nf4,
    peer,
    random_ids,
    randomise,
    reviews,
    sequence,
    train,
    trainer_log,
    works,
)
from test_models import LENGTHS, check_classifier, padded
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import minift
from minift.adapters import adapt
from minift.checkpoints import loading
from minift.checkpoints import peft as peft_format
from minift.checkpoints.weights import hub_names
from minift.data.batch import pack
from minift.layers.nf4 import Packed as NF4Linear
from minift.models import check_length
from minift.ops.dropout import Noise

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]  # RoBERTa's: ids 0 to 3
PAD = 1  # RoBERTa's padding token
SPACE = "\u0120"  # how byte-level BPE writes one
COMMON = {  # sizes that are legal but seldom tried
    "base": {},
    "one layer": dict(num_hidden_layers=1),
    "head size 7": dict(hidden_size=21, num_attention_heads=3),
    "one head": dict(num_attention_heads=1),
}


def write_bpe(folder: Path) -> None:
    """vocab.json and merges.txt as old folders have them, without tokenizer.json: a token for each word of WORDS."""
    words = [SPACE + word for word in WORDS]
    merges = dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word)))
    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), *map("".join, merges), "<mask>"]
    write(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    write(folder / "merges.txt", "#version: 0.2", *map(" ".join, merges))


def write_wordpiece(folder: Path) -> None:
    """vocab.txt, the same."""
    write(folder / "vocab.txt", *VOCABULARY)


class Kind(NamedTuple):
    """What the tests know of a family, in transformers' words."""

    name: str  # of its classes
    sizes: dict  # of a small model
    others: dict  # that are tried beside COMMON
    off: dict  # the options that turn every dropout off
    write_tokenizer: Callable[[Path], None]
    targets: list[str]  # PEFT's
    head: list[str]  # layers of its classifier that no body brings along, in the order in which they are drawn
    norm: str  # a layer norm of its last layer


KINDS = {
    "roberta": Kind(
        "Roberta",
        BERT | dict(max_position_embeddings=42, type_vocab_size=1, layer_norm_eps=1e-5),
        {
            "tanh gelu": dict(hidden_act="gelu_new"),
            "two types": dict(type_vocab_size=2),
            "padding token 0": dict(pad_token_id=0, max_position_embeddings=41),
            "padding token 5": dict(pad_token_id=5, max_position_embeddings=46),
        },
        dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        write_bpe,
        ["query", "value"],
        ["classifier.dense", "classifier.out_proj"],
        "roberta.encoder.layer.1.output.LayerNorm",
    ),
    "distilbert": Kind(
        "DistilBert",
        dict(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=40),
        {"relu": dict(activation="relu"), "sinusoidal": dict(sinusoidal_pos_embds=True)},
        dict(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
        write_wordpiece,
        ["q_lin", "v_lin"],
        ["pre_classifier", "classifier"],
        "distilbert.transformer.layer.1.output_layer_norm",
    ),
}
families = pytest.mark.parametrize("kind", KINDS)


def cls(kind: str, end: str) -> type:
    """A class of transformers: RobertaModel of "roberta" and "Model"."""
    return getattr(transformers, KINDS[kind].name + end)


def classifier(kind: str, folder: Path, **changes):
    """A random classifier of three labels of transformers', saved in a folder."""
    changes = KINDS[kind].sizes | {"num_labels": 3} | changes
    return peer(cls(kind, "ForSequenceClassification"), folder, **changes)


def lists(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random tokens, none of which pads in any of the models here."""
    return [[max(token, 6) for token in ids] for ids in random_ids(lengths, seed=seed)]


def asked(ids: list[list[int]], labels: list[int] | None = None):
    """A batch that asks about the first token of each sequence."""
    labels = labels or [0] * len(ids)
    return pack([sequence(i, x, rows=[0], targets=[y]) for i, (x, y) in enumerate(zip(ids, labels, strict=True))])


@torch.no_grad()
def logits(model, ids: list[list[int]]) -> torch.Tensor:
    """Ours."""
    return model.logits(asked(ids))


@torch.no_grad()
def peer_logits(model, ids: list[list[int]]) -> torch.Tensor:
    """Theirs, one sequence at a time."""
    return torch.cat([model(input_ids=torch.tensor([x])).logits for x in ids])


def trainable(kind: str, folder: Path) -> Path:
    """A random body with the masked-LM head that pretraining leaves, and a tokenizer."""
    sizes = KINDS[kind].sizes
    longest = sizes["max_position_embeddings"] + 60
    peer(cls(kind, "ForMaskedLM"), folder, scale=0.1, **sizes | dict(vocab_size=400, max_position_embeddings=longest))
    KINDS[kind].write_tokenizer(folder)
    return folder


# ---- numbers


@pytest.mark.parametrize("kind, case", [(kind, case) for kind in KINDS for case in (*COMMON, *KINDS[kind].others)])
def test_logits_loss_and_every_gradient(kind, case, tmp_path):
    theirs = classifier(kind, tmp_path, **(COMMON | KINDS[kind].others)[case])
    model, _ = minift.load(tmp_path, task="classify")
    assert not model.report.unused and not model.report.fresh
    ids = lists(LENGTHS)
    labels = [i % 3 for i in range(len(ids))]
    check_classifier(model, asked(ids, labels), theirs, padded(ids) | {"labels": torch.tensor(labels)})


@families
def test_a_body_without_a_head(kind, tmp_path):
    theirs = peer(cls(kind, "Model"), tmp_path, **KINDS[kind].sizes)
    model, _ = minift.load(tmp_path)
    ids = lists(LENGTHS)
    with torch.no_grad():
        want = theirs(**padded(ids)).last_hidden_state
        ours = model(pack([sequence(i, x) for i, x in enumerate(ids)]))
    assert (ours - torch.cat([want[i, : len(x)] for i, x in enumerate(ids)])).abs().max() <= 1e-5
    minift.save(model, None, tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert type(again) is type(theirs) and torch.equal(again(**padded(ids)).last_hidden_state, want)


@families
def test_packed_equals_alone_and_rows_are_a_selection(kind, tmp_path):
    """With dropout on, in any order, with or without recomputing."""
    classifier(kind, tmp_path)
    model, _ = minift.load(tmp_path, task="classify", dropout=0.3)
    ids = lists(LENGTHS)
    whole = [sequence(i, x) for i, x in enumerate(ids)]
    ends = [sequence(i, x, rows=sorted({0, len(x) - 1})) for i, x in enumerate(ids)]

    def hidden(part):
        batch = pack(part)
        h = model(batch, Noise(7, 3, batch.keys)).detach()
        return dict(zip([s.number for s in part], h.split([len(s.rows) for s in part]), strict=True))

    everywhere = hidden(whole)
    backwards = hidden(ends[::-1])
    model.compute_in(torch.float32, recompute=True)
    for s in ends:
        alone = hidden([s])[s.number]
        assert torch.allclose(everywhere[s.number][s.rows], alone, atol=1e-5)
        assert torch.allclose(backwards[s.number], alone, atol=1e-5)


@pytest.mark.slow
@families
def test_dropout_spreads_logits_as_the_peers_does(kind, tmp_path):
    """800 draws each: other masks at the same places, so the same mean (within chance) and the same spread."""
    theirs = classifier(kind, tmp_path).train()
    model, _ = minift.load(tmp_path, task="classify")
    ids = lists([30, 30, 30])
    batch = asked(ids)
    n = 800
    torch.manual_seed(1)
    with torch.no_grad():
        found = []
        for step in range(n):
            noise = Noise(42, step, batch.keys)
            found.append(model.last(model.head.features(model(batch, noise), noise.at(batch.rows))))
        ours = torch.stack(found)
        peers = torch.stack([theirs(input_ids=torch.tensor(ids)).logits for _ in range(n)])
    assert ours.std(0).mean().item() == pytest.approx(peers.std(0).mean().item(), rel=0.04)  # chance: about 1 %
    chance = (ours.var(0) / n + peers.var(0) / n).mean()
    assert ((ours.mean(0) - peers.mean(0)) ** 2).mean() / chance < 4


@families
def test_dropout_off_is_off_everywhere(kind, tmp_path):
    classifier(kind, tmp_path)
    model, _ = minift.load(tmp_path, task="classify", dropout=0.0)
    batch = asked(lists([9, 4]))
    noise = Noise(1, 2, batch.keys)
    with torch.no_grad():
        seen = model.last(model.head.features(model(batch, noise), noise.at(batch.rows)))
        assert torch.equal(seen, model.logits(batch))


@families
def test_the_longest_sequence(kind, tmp_path):
    theirs = classifier(kind, tmp_path)
    model, _ = minift.load(tmp_path, task="classify")
    assert model.config.longest == 40 and check_length(model, 0) == 40
    ids = lists([40, 40])
    assert torch.allclose(logits(model, ids), peer_logits(theirs, ids), atol=1e-5)
    with pytest.raises(minift.InputError, match="--max-length is 41; expected at most 40"):
        check_length(model, 41)


# ---- what a checkpoint's files have


@families
def test_a_saved_folder_is_transformers_own(kind, tmp_path):
    """The same names, the same numbers, the same class; loaded there and here."""
    theirs = classifier(kind, tmp_path / "theirs")
    model, _ = minift.load(tmp_path / "theirs", task="classify")
    minift.save(model, None, tmp_path / "ours")
    want, found = weights_in(tmp_path / "theirs"), weights_in(tmp_path / "ours")
    assert want.keys() == found.keys() and all(torch.equal(found[name], want[name]) for name in want)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    ids = lists([9, 1, 17])
    assert type(again) is type(theirs)
    assert torch.allclose(peer_logits(again, ids), peer_logits(theirs, ids), atol=1e-6)
    assert again.config.pad_token_id == theirs.config.pad_token_id
    assert torch.equal(logits(minift.load(tmp_path / "ours", task="classify")[0], ids), logits(model, ids))


@pytest.mark.parametrize(
    "kind, end",
    [
        *((kind, end) for kind in KINDS for end in ("Model", "ForMaskedLM", "ForQuestionAnswering")),
        ("roberta", "ForTokenClassification"),  # whose classifier.weight is no part of classifier.out_proj
    ],
)
def test_a_fresh_head_is_drawn_as_transformers_draws_it(kind, end, tmp_path):
    """On the body of a file for anything else, with its old buffers, whose own head is left out."""
    peer(cls(kind, end), tmp_path, **KINDS[kind].sizes)
    prefix = "" if end == "Model" else f"{kind}."
    state = weights_in(tmp_path) | {f"{prefix}embeddings.position_ids": torch.arange(40)[None]}
    if end == "Model" and kind == "roberta":
        assert any(name.startswith("pooler.") for name in state)
    rewrite(tmp_path, state)
    transformers.set_seed(42)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    model, _ = minift.load(tmp_path, task="classify", labels=["a", "b", "c"], seed=42)
    head = KINDS[kind].head
    assert model.report.fresh == [f"{layer}.{leaf}" for layer in head for leaf in ("weight", "bias")]
    peers = dict(theirs.named_parameters())
    for name, hub in hub_names(model).items():
        assert torch.equal(model.get_parameter(name), peers[hub]), hub
    with pytest.raises(minift.InputError, match=head[0]):
        minift.load(tmp_path, task="classify", fresh_head=False)


@families
def test_what_config_json_omits_has_transformers_defaults(kind, tmp_path):
    """Of a config.json with little in it, every field that both have is the same."""
    configure(tmp_path, model_type=kind)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = minift.models.family_named(kind).Config()
    fields = vars(ours).keys() - {"position_embedding_type"}  # of files older than transformers 5
    assert {name: getattr(ours, name) for name in fields} == {name: getattr(theirs, name) for name in fields}


@families
def test_a_pretrained_size_has_transformers_count(kind, tmp_path):
    """Built on the meta device: 124,647,170 of roberta-base and 66,955,010 of DistilBERT, with two labels."""
    of_roberta = dict(max_position_embeddings=514, type_vocab_size=1)
    changes = of_roberta if kind == "roberta" else {}
    with torch.device("meta"):
        theirs = cls(kind, "ForSequenceClassification")(transformers.AutoConfig.for_model(kind, **changes))
    model = loading.build({"model_type": kind} | changes, "here", "classify", ["no", "yes"], -1)
    assert model.size() == theirs.num_parameters() and model.config.longest == 512


# ---- adapters


@families
def test_methods_train_what_they_name(kind, tmp_path):
    classifier(kind, tmp_path)
    head = KINDS[kind].head

    def trained(method):
        model, _ = minift.load(tmp_path, task="classify")
        adapt(model, method)
        return {hub for name, hub in hub_names(model).items() if model.get_parameter(name).requires_grad}

    everything = trained("full")
    in_head = {f"{layer}.{leaf}" for layer in head for leaf in ("weight", "bias")}
    assert everything == weights_in(tmp_path).keys() and trained("head") == in_head
    assert trained("bias") == in_head | {name for name in everything if name.endswith("bias")}
    norms = {name for name in everything if "LayerNorm" in name or "layer_norm" in name}
    assert len(norms) == 10 and f"{KINDS[kind].norm}.weight" in norms and trained("norm") == in_head | norms
    assert trained("last-1") == in_head | {name for name in everything if ".layer.1." in name}


def with_peft(kind: str, folder: Path):
    """(our model, PEFT's) with LoRA, drawn from one seed, on one random classifier."""
    peft = pytest.importorskip("peft")
    theirs = classifier(kind, folder / "base", **KINDS[kind].off)
    model, _ = minift.load(folder / "base", task="classify", labels=["a", "b", "c"])
    adapt(model, "lora", rank=4, alpha=8, seed=7)
    torch.manual_seed(7)
    config = peft.LoraConfig("SEQ_CLS", target_modules=KINDS[kind].targets, r=4, lora_alpha=8)
    return model, peft.get_peft_model(theirs, config)


@families
def test_lora_begins_as_pefts(kind, tmp_path):
    """The same layers by default, the same first weights, the same layers of the head learn."""
    model, theirs = with_peft(kind, tmp_path)
    assert model.adapter.targets == tuple(KINDS[kind].targets)
    want = {
        name.replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = peft_format.tensors(model)
    assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)
    assert {id(p) for p in found.values()} == {id(p) for p in model.parameters() if p.requires_grad}


@families
def test_peft_loads_ours_and_we_load_pefts(kind, tmp_path):
    model, theirs = with_peft(kind, tmp_path)
    ids = lists([9, 1, 17])
    randomise(model)
    minift.save(model, None, tmp_path / "ours")
    base = cls(kind, "ForSequenceClassification").from_pretrained(tmp_path / "base")
    again = type(theirs).from_pretrained(base, tmp_path / "ours").eval()
    assert torch.allclose(peer_logits(again, ids), logits(model, ids), atol=1e-5)
    assert torch.equal(logits(minift.load(tmp_path / "ours")[0], ids), logits(model, ids))

    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    configure(tmp_path / "theirs" / peft_format.CONFIG, base_model_name_or_path=str(tmp_path / "base"))
    model, _ = minift.load(tmp_path / "theirs", task="classify")
    assert torch.allclose(logits(model, ids), peer_logits(theirs, ids), atol=1e-5)
    minift.save(model, None, tmp_path / "once more")
    base = cls(kind, "ForSequenceClassification").from_pretrained(tmp_path / "base")
    again = type(theirs).from_pretrained(base, tmp_path / "once more").eval()
    assert torch.allclose(peer_logits(again, ids), logits(model, ids), atol=1e-5)


@families
def test_every_linear_layer_of_the_body(kind, tmp_path):
    """all-linear: what learns in full is left out (of which PEFT adapts DistilBERT's pre_classifier, too)."""
    classifier(kind, tmp_path)
    model, _ = minift.load(tmp_path, task="classify")
    adapt(model, "lora", targets="all-linear")
    assert len(model.adapter.targets) == 12 and not any("classifier" in name for name in model.adapter.targets)


@pytest.mark.slow
@families
@pytest.mark.usefixtures("exact_bitsandbytes")
def test_a_base_in_four_bits(kind, tmp_path):
    """The same codes as bitsandbytes', the same logits; a folder in four bits loads there and here."""
    pytest.importorskip("bitsandbytes")
    classifier(kind, tmp_path, **{"hidden_size": 64})
    config = nf4(bnb_4bit_use_double_quant=True)
    config.llm_int8_skip_modules = KINDS[kind].head
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    model, _ = minift.load(tmp_path, task="classify", base="nf4")
    packed = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    assert len(packed) == 12
    for name in packed:
        layer = theirs.get_submodule(model.hub_name(name))
        assert torch.equal(model.get_submodule(name).weight, layer.weight.data), name
    ids = lists([9, 1, 17])
    assert torch.allclose(logits(model, ids), peer_logits(theirs, ids), atol=1e-4)
    minift.save(model, None, tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed", device_map="cpu")
    assert torch.allclose(peer_logits(again, ids), logits(model, ids), atol=1e-4)
    assert torch.equal(logits(minift.load(tmp_path / "packed", task="classify")[0], ids), logits(model, ids))


# ---- training


@pytest.mark.slow
@families
@pytest.mark.parametrize("method", ["full", "lora"])
def test_twenty_steps_follow_the_trainer(kind, method, tmp_path):
    """From a masked-LM checkpoint with a fresh head and the family's own tokenizer, dropout off."""
    folder = trainable(kind, tmp_path / "model")
    data = reviews(tmp_path / "train.tsv", 60)
    transformers.set_seed(42)
    options = dict(num_labels=2, dtype=torch.float32) | KINDS[kind].off
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    if method == "lora":
        peft = pytest.importorskip("peft")
        torch.manual_seed(42)
        config = peft.LoraConfig("SEQ_CLS", target_modules=KINDS[kind].targets, r=8, lora_alpha=32, lora_dropout=0.0)
        theirs = peft.get_peft_model(theirs, config)
    model, tokenizer = minift.load(folder, task="classify", labels=["blame", "praise"], dropout=0.0, seed=42)

    tokens = AutoTokenizer.from_pretrained(folder)
    rows = [line.split("\t") for line in data.read_text().splitlines()]
    encoded = [{**tokens(text), "labels": ["blame", "praise"].index(label)} for text, label in rows]
    schedule = dict(warmup_steps=3, weight_decay=0.01, max_grad_norm=1.0, learning_rate=1e-3)
    collator = DataCollatorWithPadding(tokens)
    expected = trainer_log(theirs, encoded, collator, tmp_path / "peer", **schedule)

    options = dict(steps=20, batch=8, seed=42, warmup=3, weight_decay=0.01, lr=1e-3, labels="blame,praise")
    if method == "lora":
        adapt(model, "lora", dropout=0.0, seed=42)
    train(model, tokenizer, data, tmp_path / "run", model=str(folder), **options)
    found = metrics(tmp_path / "run")

    assert len(found) == len(expected) == 20
    for ours, their in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(their["loss"], abs=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)


@pytest.mark.slow
@families
def test_the_commands(kind, tmp_path):
    """train, eval, predict and inspect, on a folder without tokenizer.json; the loss falls."""
    trainable(kind, tmp_path / "model")
    reviews(tmp_path / "train.tsv", 200)
    reviews(tmp_path / "valid.tsv", 40, seed=1)
    work = dict(d=tmp_path)
    line = "train --model {d}/model --data {d}/train.tsv --valid {d}/valid.tsv --out {d}/run --epochs 4 --lr 3e-3"
    said = works(line, **work)
    assert KINDS[kind].head[0] in said.err
    seen = losses(tmp_path / "run")
    assert sum(seen[-10:]) < 0.5 * sum(seen[:10])
    assert works("eval --model {d}/run --data {d}/valid.tsv --json", **work).last["accuracy"] > 0.9
    rows = works('predict --model {d}/run --text "a great film"', **work).rows
    assert set(rows[0]["scores"]) == {"blame", "praise"} and rows[0]["scores"][rows[0]["label"]] >= 0.5
    assert KINDS[kind].head[0] in works("inspect --model {d}/run", **work).out
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/last")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run/last")
    with torch.no_grad():
        scores = theirs(**tokens("a great film", return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert dict(zip(theirs.config.label2id, scores, strict=True)) == pytest.approx(rows[0]["scores"], abs=1e-4)


@pytest.mark.slow
@families
def test_the_commands_with_an_adapter_over_four_bits(kind, tmp_path):
    trainable(kind, tmp_path / "model")
    reviews(tmp_path / "train.tsv", 80)
    work = dict(d=tmp_path)
    line = "train --model {d}/model --data {d}/train.tsv --out {d}/run --method lora --base nf4 --lr 1e-2 --epochs 4"
    works(line, **work)
    seen = losses(tmp_path / "run")
    assert sum(seen[-5:]) < sum(seen[:5])
    before = works('predict --model {d}/run --text "a great film"', **work).rows[0]["scores"]
    works("merge --model {d}/run --out {d}/merged --into dequantized", **work)
    after = works('predict --model {d}/merged --text "a great film"', **work).rows[0]["scores"]
    assert after == pytest.approx(before, abs=1e-4)


# ---- RoBERTa alone


def test_a_padding_token_in_a_text_has_no_position_of_its_own(tmp_path):
    """Somebody wrote "<pad>": transformers does not count it, nor do we; packed as alone."""
    theirs = classifier("roberta", tmp_path)
    model, _ = minift.load(tmp_path, task="classify")
    ids = [[PAD, 7, 8], [9, PAD, PAD, 10, 11], [12], [PAD], [13, 14, PAD]]
    want = peer_logits(theirs, ids)
    assert torch.allclose(logits(model, ids), want, atol=1e-5)
    assert torch.allclose(torch.cat([logits(model, [x]) for x in ids]), want, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pad_token_id=None), "pad_token_id is None; expected a whole number from 0"),
        (dict(pad_token_id=-1), "pad_token_id is -1; expected a whole number from 0"),
        (dict(max_position_embeddings=2), "max_position_embeddings is 2; expected at least 3"),
        (dict(is_decoder=True), "is_decoder is True; expected False"),
        (dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
        (dict(hidden_act="mish"), "hidden_act is 'mish'; expected one of"),
        (dict(hidden_size=33), "hidden_size 33, num_attention_heads 4"),
    ],
    ids=str,
)
def test_robertas_that_are_refused(changes, words, tmp_path):
    classifier("roberta", tmp_path)
    configure(tmp_path, **changes)
    refuse(tmp_path, "config.json", words)


def test_a_padding_token_that_is_not_named_stays_1(tmp_path):
    """A config.json without pad_token_id: nothing is written that would move the positions."""
    theirs = classifier("roberta", tmp_path)
    configure(tmp_path, pad_token_id=...)
    model, _ = minift.load(tmp_path, task="classify")
    minift.save(model, None, tmp_path / "again")
    ids = lists([9, 3])
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    for found in (logits(model, ids), peer_logits(again, ids)):
        assert torch.allclose(found, peer_logits(theirs, ids), atol=1e-5)


def test_pairs_are_of_one_type(tmp_path):
    """RoBERTa's tokenizer gives 0 to both texts; so they go where a BERT with one type would refuse them."""
    folder = trainable("roberta", tmp_path)
    model, tokenizer = minift.load(folder, task="classify", labels=["a", "b"])
    rows = minift.predict(model, tokenizer, [("a film", "a plot")])
    assert len(rows) == 1
    (tokens,) = tokenizer.encode(["a"], ["b"])
    assert tokens.ids == AutoTokenizer.from_pretrained(folder)("a", "b")["input_ids"] and not any(tokens.types)


# ---- DistilBERT alone


def test_a_config_in_the_words_of_other_models(tmp_path):
    """hidden_size and its like, as transformers takes them; two that differ are refused."""
    theirs = classifier("distilbert", tmp_path)
    others = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    configure(tmp_path, dim=..., n_layers=..., n_heads=..., **others)
    model, _ = minift.load(tmp_path, task="classify")
    assert torch.allclose(logits(model, lists([9])), peer_logits(theirs, lists([9])), atol=1e-5)
    configure(tmp_path, n_layers=3)
    refuse(tmp_path, "num_hidden_layers is 2, but n_layers, its other name, 3")


def test_what_distilbert_does_not_read(tmp_path):
    """BERT's names for rates, widths and the norms' epsilon mean nothing there, nor here."""
    theirs = classifier("distilbert", tmp_path)
    configure(tmp_path, layer_norm_eps=1.0, intermediate_size=5, hidden_act="relu", hidden_dropout_prob=0.9)
    model, _ = minift.load(tmp_path, task="classify")
    assert torch.allclose(logits(model, lists([9])), peer_logits(theirs, lists([9])), atol=1e-5)
    configure(tmp_path, activation="mish")
    refuse(tmp_path, "activation is 'mish'; expected one of")
    configure(tmp_path, activation="gelu", n_heads=5)
    refuse(tmp_path, "dim 32, n_heads 5, n_layers 2; expected a layer or more, and heads that divide the width")
