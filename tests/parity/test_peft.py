"""Adapters beside PEFT: the same first weights, the same training, files that load both ways.

MINIFT_ASSETS=../shared python -m pytest tests/parity/test_peft.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from folders import configure, with_nan
from helpers import nf4, peer, peer_logits, random_ids, randomise, sequence, small_bert
from safetensors.torch import load_file, save_file

import minift
from minift.adapters import adapt, lora
from minift.adapters.lora import adapters
from minift.checkpoints import peft as peft_format
from minift.data.batch import order, pack
from minift.engine.optim import clip, make_optimizer
from minift.errors import InputError
from minift.layers.nf4 import Packed as NF4Linear
from minift.ops.dropout import SILENT
from minift.tasks import task_named

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
CLASSES = {
    "bert": (transformers.BertForSequenceClassification, "classify", "SEQ_CLS"),
    "gpt2": (transformers.GPT2LMHeadModel, "complete", "CAUSAL_LM"),
    "gpt2-classify": (transformers.GPT2ForSequenceClassification, "classify", "SEQ_CLS"),
}
OFF = {  # the options that turn every dropout of the peer's model off
    "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
}


def pair(kind, folder, ours: dict, theirs: dict, seed=7, **changes):
    """(our model, PEFT's) with the same adapter, drawn from the same seed, on the same random base."""
    cls, task, task_type = CLASSES[kind]
    if kind == "gpt2-classify":
        changes = {"pad_token_id": 0} | changes
    base = peer(cls, folder / "base", scale=0.15, **changes)
    model, _ = minift.load(folder / "base", task=task)
    adapt(model, ours.pop("method", "lora"), seed=seed, **ours)
    torch.manual_seed(seed)
    return model, peft.get_peft_model(base, peft.LoraConfig(task_type=task_type, **theirs)).eval()


def logits(model, ids) -> torch.Tensor:
    """Ours at what the task asks about, one sequence after the other."""
    at = {
        "complete": lambda x: range(len(x)),
        "classify": lambda x: [0 if model.family.ASKED == "first" else len(x) - 1],
    }
    return model.logits(pack([sequence(i, x, rows=list(at[model.task](x))) for i, x in enumerate(ids)]))


# first weights and which layers

SETTINGS = {
    "default": ("bert", {}, {}),
    "default gpt2": ("gpt2", {}, {}),
    "classifier": ("gpt2-classify", {}, {}),
    "list": ("bert", {"targets": "dense,key"}, {"target_modules": ["dense", "key"]}),
    "c_proj twice": ("gpt2", {"targets": "c_proj"}, {"target_modules": ["c_proj"]}),
    "pattern": ("bert", {"targets": r".*layer\.1\..*(query|key)"}, {"target_modules": r".*layer\.1\..*(query|key)"}),
    "all": ("bert", {"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "all gpt2": ("gpt2", {"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "layers": ("gpt2", {"layers": (1,)}, {"layers_to_transform": [1]}),
    "exclude": (
        "bert",
        {"targets": "query,value", "exclude": ("layer.0.attention.self.query",)},
        {"target_modules": ["query", "value"], "exclude_modules": ["layer.0.attention.self.query"]},
    ),
    "patterns": (
        "bert",
        {"rank_pattern": {"query": 2, "layer.1.*value": 5}, "alpha_pattern": {"value": 3}},
        {"rank_pattern": {"query": 2, "layer.1.*value": 5}, "alpha_pattern": {"value": 3}},
    ),
    "rank-stabilised": ("gpt2", {"rslora": True}, {"use_rslora": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_layers_and_first_weights(name, tmp_path):
    """Names, ranks, scales, and A to the bit; the same number of trained parameters."""
    kind, ours, theirs = SETTINGS[name]
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
    model, their = pair(kind, tmp_path, {"rank": 4, "alpha": 8} | ours, lora | theirs)
    modules = {n.removeprefix("base_model.model."): m for n, m in their.named_modules() if hasattr(m, "lora_A")}
    found = dict(adapters(model))
    assert list(found) == list(modules) and found
    for hub, lora in found.items():
        assert torch.equal(lora.A, modules[hub].lora_A["default"].weight) and not lora.B.any()
        assert lora.scale == pytest.approx(modules[hub].scaling["default"]), hub
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == their.get_nb_trainable_parameters()[0]


def test_a_regular_expression_and_numbers_of_layers_are_written_as_names(tmp_path):
    """PEFT refuses a file with both."""
    model, _ = minift.load(small_bert(tmp_path / "base"))
    adapt(model, "lora", targets=r".*(query|key)", layers=(1,))
    minift.save(model, None, tmp_path / "adapter")
    base = transformers.BertModel.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    adapted = [name for name, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert adapted == [f"base_model.model.encoder.layer.1.attention.self.{name}" for name in ("query", "key")]
    again, _ = minift.load(tmp_path / "adapter")
    assert [name for name, _ in adapters(again)] == [name for name, _ in adapters(model)]


@pytest.mark.slow
def test_the_counts_people_know(tmp_path):
    """gpt2, r=8, c_attn: 294,912; bert-base, r=8, query and value, two labels: 296,450."""
    gpt2 = transformers.GPT2Config(vocab_size=9, n_positions=4)
    bert = transformers.BertConfig(vocab_size=9, max_position_embeddings=4)
    for kind, config, count in (("gpt2", gpt2, 294_912), ("bert", bert, 296_450)):
        cls, task, _ = CLASSES[kind]
        cls(config).save_pretrained(tmp_path / task)
        model, _ = minift.load(tmp_path / task, task=task)
        minift.add_lora(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


# training


def batches(kind: str, n: int = 24, size: int = 4):
    """Twenty steps of encoded sequences, in the order of an epoch after the other."""
    rng = np.random.default_rng(0)
    examples = []
    for i, ids in enumerate(random_ids(rng.integers(2, 30, n).tolist())):
        rows = {"bert": [0], "gpt2-classify": [len(ids) - 1], "gpt2": list(range(len(ids) // 2, len(ids) - 1))}[kind]
        rows = rows or [0]
        targets = [i % 2] if kind != "gpt2" else [ids[r + 1] for r in rows]
        examples.append(sequence(i, ids, rows, targets))
    for step in range(20):
        epoch, at = divmod(step * size, n)
        yield [examples[j] for j in order(n, 42, epoch)[at : at + size].tolist()]


def our_losses(model, kind, lr) -> list[float]:
    """Twenty steps without dropout, as train_step takes them."""
    optimizer, losses = make_optimizer(model, lr, 0.0), []
    for sequences in batches(kind):
        batch = pack(sequences)
        loss, _ = task_named(model.task).loss(model, batch, SILENT, 0.0)
        (loss / batch.n_targets).backward()
        clip([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / batch.n_targets)
    return losses


def peer_losses(model, kind, lr) -> list[float]:
    """The same with the peer's model, padded."""
    parameters, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for sequences in batches(kind):
        longest = max(map(len, sequences))
        ids = torch.tensor([[*s.ids, *[0] * (longest - len(s))] for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        labels = torch.tensor([s.targets[0] for s in sequences])
        if kind == "gpt2":
            labels = torch.full_like(ids, -100)
            for i, s in enumerate(sequences):
                labels[i, s.rows + 1] = torch.from_numpy(s.targets)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind, method", [(k, m) for k in CLASSES for m in ("lora", "dora", "pissa")])
def test_twenty_steps_follow_peft(kind, method, tmp_path):
    """From the same seed, without copying any weight; dropout 0; a classifier that is trained and saved beside it."""
    extra = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.get(method, {})
    options = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0} | extra
    model, their = pair(kind, tmp_path, {"method": method, "dropout": 0.0}, options)
    assert our_losses(model, kind, 2e-3) == pytest.approx(peer_losses(their, kind, 2e-3), abs=1e-5)
    ids = random_ids([9, 1, 17])
    assert torch.allclose(logits(model, ids), peer_logits(their, ids), atol=2e-4)  # weights after 20 steps of AdamW


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_qlora_follows_peft_and_bitsandbytes(kind, tmp_path):
    """Twenty steps over an NF4 base with double quantisation, bit-equal codes; sums in another order make the rest."""
    bnb = pytest.importorskip("bitsandbytes")
    cls, task, task_type = CLASSES[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 128} if kind == "bert" else {"n_embd": 64}
    peer(cls, tmp_path / "base", scale=0.15, **sizes)
    model, _ = minift.load(tmp_path / "base", task=task, base="nf4")
    minift.add_lora(model, dropout=0.0, seed=7)
    config = nf4(bnb_4bit_use_double_quant=True)
    kinds = dict(quantization_config=config, dtype=torch.float32, device_map="cpu")
    base = cls.from_pretrained(tmp_path / "base", **kinds, **OFF[kind])
    torch.manual_seed(7)
    their = peft.get_peft_model(base, peft.LoraConfig(task_type=task_type, r=8, lora_alpha=32)).train()
    packed = {n: m for n, m in their.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    mine = {model.hub_name(n).removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    for name, layer in mine.items():
        other = next(m for n, m in packed.items() if n.removesuffix(".base_layer").endswith(name.removesuffix(".base")))
        assert torch.equal(layer.weight, other.weight.data), name
    assert our_losses(model, kind, 2e-3) == pytest.approx(peer_losses(their, kind, 2e-3), abs=1e-5)


# files


@pytest.mark.parametrize("name", [*SETTINGS, "dora"])
def test_peft_loads_ours(name, tmp_path):
    """Equal logits, and the trained head too, where there is one."""
    kind, ours, _ = SETTINGS.get(name) or ("bert", {"method": "dora"}, {})
    cls, _, _ = CLASSES[kind]
    model, _ = pair(kind, tmp_path, {"rank": 4, "alpha": 8} | ours, {})
    randomise(model)
    minift.save(model, None, tmp_path / "adapter")
    base = cls.from_pretrained(tmp_path / "base")
    their = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = random_ids([9, 1, 17])
    assert torch.allclose(logits(model, ids), peer_logits(their, ids), atol=1e-5)
    again, _ = minift.load(tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("name", [*SETTINGS, "dora"])
def test_we_load_pefts(name, tmp_path):
    kind, _, theirs = SETTINGS.get(name) or ("gpt2", {}, {"use_dora": True})
    _, their = pair(kind, tmp_path, {}, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1} | theirs)
    randomise(their)
    their.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    model, _ = minift.load(tmp_path / "adapter", task=CLASSES[kind][1])
    ids = random_ids([9, 1, 17])
    assert torch.allclose(logits(model, ids), peer_logits(their, ids), atol=1e-5)


def test_a_saved_language_model_head_is_untied(tmp_path):
    """PEFT trains a copy of the embedding there; so the head gets a weight of its own here."""
    _, their = pair("gpt2", tmp_path, {}, {"r": 2, "modules_to_save": ["lm_head"]})
    randomise(their)
    their.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    model, _ = minift.load(tmp_path / "adapter")
    ids = random_ids([9, 4])
    assert not model.tied and torch.allclose(logits(model, ids), peer_logits(their, ids), atol=1e-5)


def change(folder, **values) -> None:
    """Sets values in an adapter_config.json; a value of ... takes the field out."""
    configure(folder / peft_format.CONFIG, **values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-seqcls", "gpt2-causal-lm", "gpt2-seqcls"])
def test_the_real_adapters(name, assets, tmp_path):
    """Adapters of others, on a random base of the right width and depth: PEFT and we compute the same with them."""
    kind = {"bert-seqcls": "bert", "gpt2-causal-lm": "gpt2", "gpt2-seqcls": "gpt2-classify"}[name]
    cls, task, _ = CLASSES[kind]
    published = assets / "weights/peft-adapters" / name
    if not published.is_dir():
        pytest.skip(f"{published} is missing; benchmarks/assets.py knows no public address of it")
    shutil.copytree(published, tmp_path / "adapter")
    heads = [t for n, t in load_file(tmp_path / "adapter" / peft_format.WEIGHTS).items() if ".lora_" not in n]
    small = {"vocab_size": 99}
    if kind == "bert":
        config = transformers.BertConfig(intermediate_size=64, num_labels=len(heads[-1]), **small)
    else:
        labels = {"num_labels": len(heads[0]), "pad_token_id": 0} if heads else {}
        config = transformers.GPT2Config(n_positions=40, bos_token_id=0, eos_token_id=0, **labels, **small)
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "base")
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    model, _ = minift.load(tmp_path / "adapter", task=task)
    their = peft.PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    ids = random_ids([9, 1, 17])
    assert torch.allclose(logits(model, ids), peer_logits(their, ids), atol=1e-5)
    minift.save(model, None, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / f / peft_format.WEIGHTS) for f in ("adapter", "ours"))
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in ours.items()}
    assert all(torch.equal(ours[n], t.float()) for n, t in theirs.items())
    theirs, ours = (json.loads((tmp_path / f / peft_format.CONFIG).read_text()) for f in ("adapter", "ours"))
    for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "fan_in_fan_out"):
        assert ours[key] == theirs[key], key
    assert set(ours["target_modules"]) == set(theirs["target_modules"])


# what is refused


@pytest.fixture
def saved(tmp_path):
    """A good adapter folder, with lora on query and value and a classifier."""
    model, _ = pair("bert", tmp_path, {"rank": 4}, {})
    minift.save(model, None, tmp_path / "adapter")
    return tmp_path / "adapter"


LAYER = "base_model.model.bert.encoder.layer"
A = f"{LAYER}.1.attention.self.query.lora_A.weight"
B = f"{LAYER}.0.attention.self.value.lora_B.weight"
POOLER, HEAD = "base_model.model.bert.pooler.dense.lora_A.weight", "base_model.model.classifier.weight"
FAULTS = {  # what becomes of the tensors, and what is said of it
    "a rank": (lambda t: t | {A: t[A][:3].clone()}, rf"{A} is \(3, 32\); expected \(4, 32\)"),
    "no B": (lambda t: {n: x for n, x in t.items() if n != B}, rf"{B} is missing; expected \(32, 4\)"),
    "width": (lambda t: t | {A: torch.zeros(4, 48)}, rf"{A} is \(4, 48\); expected \(4, 32\)"),
    "nan": (lambda t: t | {A: with_nan(t[A])}, f"{A} has numbers that are not finite"),
    "extra": (lambda t: t | {POOLER: torch.zeros(4, 32)}, rf"{POOLER} \(4, 32\) belongs to no adapted layer"),
    "head": (lambda t: t | {HEAD: torch.zeros(5, 32)}, rf"{HEAD} is \(5, 32\); expected \(2, 32\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_ill_formed_weights_are_refused_by_name(saved, fault):
    change, words = FAULTS[fault]
    path = saved / peft_format.WEIGHTS
    save_file(change(load_file(path)), path)
    with pytest.raises(InputError, match=words):
        minift.load(saved)


def test_weights_that_were_cut_are_refused(saved):
    path = saved / peft_format.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        minift.load(saved)


@pytest.mark.parametrize("values, words", [
    ({"peft_type": "VERA"}, "peft_type is 'VERA'; expected 'LORA'"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"use_qalora": True}, "use_qalora"),
    ({"modules_to_save": ["position_embeddings"]}, "modules_to_save names position_embeddings"),
    ({"r": "eight"}, "eight"),
    ({"base_model_name_or_path": None}, "no base_model_name_or_path"),
    ({"target_modules": ["nothing"]}, "no layer has such a name"),
], ids=str)  # fmt: skip
def test_what_the_engine_lacks_is_refused_by_name(saved, values, words):
    change(saved, **values)
    with pytest.raises(InputError, match=words):
        minift.load(saved)


def test_fields_that_are_not_known_or_not_there_do_no_harm(saved):
    gone = ("rank_pattern", "use_dora", "exclude_modules", "init_lora_weights", "lora_dropout")
    change(saved, **dict.fromkeys(gone, ...), a_field_of_the_future=3)
    model, _ = minift.load(saved)
    assert model.report.adapter == 10 and model.adapter.dropout == 0


def test_a_tensor_of_the_whole_adapter_is_the_methods_affair(saved, monkeypatch):
    """As what VeRA's layers share. It does not make the file one of the body alone, whose targets have no prefix."""
    change(saved, target_modules=r"bert\.encoder\..*(query|value)")
    weights = saved / peft_format.WEIGHTS
    save_file(load_file(weights) | {"base_model.shared": torch.ones(2)}, weights)
    with pytest.raises(InputError, match=r"base_model.shared \(2,\) belongs to no adapted layer"):
        minift.load(saved)

    def on_base(model, config, found):
        assert found.pop("base_model.shared").equal(torch.ones(2))
        return config, found

    monkeypatch.setattr(lora, "on_base", on_base)
    assert minift.load(saved)[0].report.adapter == 10


def test_a_base_of_another_width(saved, tmp_path):
    peer(transformers.BertForSequenceClassification, tmp_path / "wide", hidden_size=48)
    change(saved, base_model_name_or_path=str(tmp_path / "wide"))
    with pytest.raises(InputError, match=r"lora_A.weight is \(4, 32\); expected \(4, 48\)"):
        minift.load(saved)
