"""IA3 beside PEFT: the same layers and training, files that load both ways; and whole runs, as of any other method.

python -m pytest tests/parity/test_ia3.py
"""

import json
import shutil

import pytest
import torch
import transformers
from folders import configure
from helpers import peer, peer_logits, random_ids, reviews, sequence, small_bert, small_gpt2
from safetensors.torch import load_file, save_file
from test_peft import CLASSES, OFF, batches, logits, our_losses, peer_losses

import minift
from minift import cli
from minift.adapters import adapt
from minift.adapters.ia3 import IA3Linear
from minift.adapters.learned import learned
from minift.adapters.targets import wrappers
from minift.checkpoints import peft as peft_format
from minift.checkpoints.merging import merge_layers
from minift.data.batch import pack
from minift.engine.optim import make_optimizer
from minift.errors import InputError
from minift.layers.nf4 import Packed as NF4Linear
from minift.ops.dropout import SILENT
from minift.setup import default_lr
from minift.tasks import task_named

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # PEFT's own, of every Conv1D
]

FIRST = ".*layer.1..*(key|output.dense)"
SETTINGS = {
    "default": ("bert", {}, {}),
    "default gpt2": ("gpt2", {}, {}),
    "classifier": ("gpt2-classify", {}, {}),
    "outputs alone": ("bert", {"targets": "key"}, {"target_modules": ["key"]}),
    "one name for both": ("bert", {"targets": "dense,query"}, {"target_modules": ["dense", "query"]}),
    "c_proj twice": ("gpt2", {"targets": "c_proj"}, {"target_modules": ["c_proj"]}),
    "pattern": ("bert", {"targets": FIRST}, {"target_modules": FIRST}),
    "all": ("bert", {"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "all gpt2": ("gpt2", {"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "layers": ("gpt2", {"layers": (1,)}, {"target_modules": r".*h\.1\.(attn\.c_attn|mlp\.c_proj)"}),
    "exclude": (
        "bert",
        {"exclude": ("attention.output.dense",)},
        {"exclude_modules": ["attention.output.dense"]},
    ),
}
LAYER = "bert.encoder.layer.1."
DENSE = ["attention.output.dense", "intermediate.dense", "output.dense"]
KINDS = pytest.mark.parametrize("kind", CLASSES)
EVERY = pytest.mark.parametrize("name", SETTINGS)


def pair(kind, folder, ours: dict, theirs: dict, **changes):
    """(our model, PEFT's) with the same adapter on the same random base."""
    cls, task, task_type = CLASSES[kind]
    if kind == "gpt2-classify":
        changes = {"pad_token_id": 0} | changes
    base = peer(cls, folder / "base", scale=0.15, **changes)
    model, _ = minift.load(folder / "base", task=task)
    adapt(model, "ia3", **ours)
    return model, peft.get_peft_model(base, peft.IA3Config(task_type=task_type, **theirs)).eval()


def randomise(model) -> None:
    """Gives every trained parameter values that show in the outputs, another for each, whatever its size."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)


def equal(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-6) -> bool:
    """Whether no number differs by more than `bound` of the largest."""
    return (ours - theirs).abs().max() <= bound * theirs.abs().max()


def scaled(model) -> dict[str, tuple[int, ...]]:
    """Name in PEFT's file -> shape, of all factors of ours."""
    return {n: tuple(t.shape) for n, t in peft_format.tensors(model).items() if n.endswith("ia3_l")}


# which layers, and where


@EVERY
def test_the_same_layers_scaled_at_the_same_end(name, tmp_path):
    """Names, shapes, the number of trained parameters; and that a fresh adapter changes nothing."""
    kind, ours, theirs = SETTINGS[name]
    model, their = pair(kind, tmp_path, ours, theirs)
    found = {n.replace(".default", ""): p for n, p in their.named_parameters() if "ia3_l" in n}
    assert scaled(model) == {n: tuple(p.shape) for n, p in found.items()} and found
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == their.get_nb_trainable_parameters()[0]
    assert all((p == 1).all() and p.dtype == torch.float32 for n, p in model.named_parameters() if "factors" in n)
    plain, _ = minift.load(tmp_path / "base", task=model.task)
    states = [m(pack([sequence(0, random_ids([9])[0])])) for m in (model, plain)]
    assert torch.equal(*states)


def test_the_counts_people_know(tmp_path):
    """A layer of gpt2: 2304 + 3072 factors; of bert-base: 768 + 768 + 768 + 3072, and two labels."""
    gpt2 = transformers.GPT2Config(vocab_size=9, n_positions=4, n_layer=1)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    bert = transformers.BertConfig(vocab_size=9, max_position_embeddings=4, num_hidden_layers=1)
    transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    for kind, task, count in (("gpt2", "complete", 5_376), ("bert", "classify", 5_376 + 1_538)):
        model, _ = minift.load(tmp_path / kind, task=task)
        adapt(model, "ia3")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"targets": "c_attn"}, "targets .*c_attn.*: no layer has such a name"),
        ({"targets": "(key"}, "targets is '.key': not a regular expression"),
        ({"exclude": "(key"}, "exclude is '.key': not a regular expression"),
        ({"layers": (9,)}, "in layers 9: no layer has such a name"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(wrong, words, tmp_path):
    model, _ = minift.load(small_bert(tmp_path / "model"), task="classify")
    with pytest.raises(InputError, match=words):
        adapt(model, "ia3", **wrong)


# training


@KINDS
def test_gradients_are_pefts(kind, tmp_path):
    """Of factors that are not 1, and of the head."""
    model, their = pair(kind, tmp_path, {}, {})
    randomise(model)
    minift.save(model, None, tmp_path / "adapter")
    base = CLASSES[kind][0].from_pretrained(tmp_path / "base")
    their = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    batch = next(batches(kind))
    packed = pack(batch)
    loss, _ = task_named(model.task).loss(model, packed, SILENT, 0.0)
    (loss / packed.n_targets).backward()
    theirs = {n: p.grad for n, p in gradients(their, kind, batch).items()}
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {id(p): model.hub_name(n) for n, p in ours.items()}
    for p in ours.values():
        hub = "base_model.model." + names[id(p)].replace(".factors", ".ia3_l")
        want = theirs.pop(hub)
        assert equal(p.grad, want.reshape(p.shape), 1e-5), hub
    assert not theirs


def gradients(model, kind, batch) -> dict:
    """The peer's trained parameters by their names in a file, after backward of a batch, one sequence at a time."""
    total = sum(len(s.targets) for s in batch)
    for s in batch:
        ids = torch.tensor([s.ids.tolist()])
        out = model(input_ids=ids).logits[0]
        at = out[s.rows] if kind == "gpt2" else out[None]
        loss = torch.nn.functional.cross_entropy(at, torch.from_numpy(s.targets), reduction="sum")
        (loss / total).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n.replace(".modules_to_save", "").replace(".default", ""): p for n, p in trained.items()}


@KINDS
def test_twenty_steps_follow_peft(kind, tmp_path):
    """At the default learning rate; a classifier is trained beside the factors."""
    model, their = pair(kind, tmp_path, {}, {})
    lr = default_lr(model)
    assert lr == 3e-3
    ours, theirs = our_losses(model, kind, lr), peer_losses(their, kind, lr)
    assert ours == pytest.approx(theirs, abs=1e-5) and ours[-1] < ours[0]
    ids = random_ids([9, 1, 17])
    assert torch.allclose(logits(model, ids), peer_logits(their, ids), atol=2e-4)  # weights after 20 steps of AdamW


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_over_four_bits_as_peft_and_bitsandbytes(kind, tmp_path):
    """Twenty steps over the same NF4 codes."""
    pytest.importorskip("bitsandbytes")
    cls, task, task_type = CLASSES[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 128} if kind == "bert" else {"n_embd": 64}
    peer(cls, tmp_path / "base", scale=0.15, **sizes)
    model, _ = minift.load(tmp_path / "base", task=task, base="nf4")
    adapt(model, "ia3")
    assert all(isinstance(layer.frozen, NF4Linear) for layer in wrappers(model).values())
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "bert.pooler.dense", "lm_head"],
    )
    how = dict(quantization_config=config, dtype=torch.float32, device_map="cpu")
    base = cls.from_pretrained(tmp_path / "base", **how, **OFF[kind.removesuffix("-classify")])
    their = peft.get_peft_model(base, peft.IA3Config(task_type=task_type)).train()
    assert our_losses(model, kind, 3e-3) == pytest.approx(peer_losses(their, kind, 3e-3), abs=1e-5)


def test_factors_do_not_decay(tmp_path):
    """They are 1 where nothing was learned: decay would pull them to 0, and the layer with them."""
    model, _ = minift.load(small_bert(tmp_path / "model"), task="classify")
    adapt(model, "ia3")
    decay = {}
    for group in make_optimizer(model, 1e-3, 0.1).param_groups:
        decay |= {id(p): group["weight_decay"] for p in group["params"]}
    assert {decay[id(m.factors)] for m in model.modules() if isinstance(m, IA3Linear)} == {0.0}


def test_a_factor_near_1_counts_in_bfloat16(tmp_path):
    """1.003 is 1 in bfloat16; the factors multiply in float32, as PEFT's do."""
    model, _ = minift.load(small_bert(tmp_path / "model"), task="classify")
    adapt(model, "ia3", targets="key")
    (layer, *_) = wrappers(model).values()
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        before = layer(x)
        layer.factors.fill_(1.003)
        after = layer(x)
    assert after.dtype == torch.bfloat16 and (after != before).float().mean() > 0.2
    assert torch.equal(after, (before.float() * 1.003).bfloat16())


@pytest.mark.parametrize("cls", [transformers.BertForSequenceClassification, transformers.GPT2LMHeadModel])
def test_saved_activations(cls, tmp_path):
    """12 values of width C a token and layer, and a few single numbers: a scaled activation is not kept twice."""
    width, tokens, bert = 64, 40, "Bert" in cls.__name__
    counts = []
    for n in (2, 8):
        sizes = {"n_layer": n, "n_embd": width}
        if bert:
            sizes = {"num_hidden_layers": n, "hidden_size": width, "intermediate_size": 4 * width}
        peer(cls, tmp_path / str(n), **sizes)
        model, _ = minift.load(tmp_path / str(n), task="classify" if bert else "complete")
        adapt(model, "ia3")
        owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        saved = {}

        def note(t, saved=saved):
            if not hasattr(t, "recipe") and t.is_floating_point():  # what has one is not kept (ops/rematerialise.py)
                saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model.body(pack([sequence(0, random_ids([tokens])[0], rows=[0])]))
        counts.append(sum(t.untyped_storage().nbytes() // 4 for at, t in saved.items() if at not in owned))
    assert (counts[1] - counts[0]) / 6 / tokens / width < 12.5


# files


@EVERY
def test_peft_loads_ours(name, tmp_path):
    """Equal logits, and the trained head too, where there is one."""
    kind, ours, _ = SETTINGS[name]
    cls, _, _ = CLASSES[kind]
    model, _ = pair(kind, tmp_path, ours, {})
    randomise(model)
    minift.save(model, None, tmp_path / "adapter")
    base = cls.from_pretrained(tmp_path / "base")
    their = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = random_ids([9, 1, 17])
    assert equal(logits(model, ids), peer_logits(their, ids))
    again, _ = minift.load(tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(model, ids)) and scaled(again) == scaled(model)


ODD = {
    "no feedforward": ("bert", {"target_modules": ["key", "output.dense"], "feedforward_modules": []}),
    "a pattern": ("gpt2", {"feedforward_modules": r".*h\.0\.(mlp\.c_proj|attn\.c_attn)"}),
    "half a word": ("bert", {"target_modules": r".*(key|query)", "feedforward_modules": ["ey"]}),
    "drawn at random": ("gpt2", {"init_ia3_weights": False}),
    "more is saved": ("bert", {"modules_to_save": ["pooler"]}),
}


@pytest.mark.parametrize("name", [*SETTINGS, *ODD])
def test_we_load_pefts(name, tmp_path):
    kind, theirs = ODD.get(name) or (SETTINGS[name][0], SETTINGS[name][2])
    torch.manual_seed(3)
    _, their = pair(kind, tmp_path, {}, theirs)
    randomise(their)
    their.save_pretrained(tmp_path / "adapter")
    configure(tmp_path / "adapter" / peft_format.CONFIG, base_model_name_or_path=str(tmp_path / "base"))
    model, _ = minift.load(tmp_path / "adapter", task=CLASSES[kind][1])
    ids = random_ids([9, 1, 17])
    assert equal(logits(model, ids), peer_logits(their, ids))

    # what we write of it, PEFT can read, also where it cannot read its own
    minift.save(model, None, tmp_path / "ours")
    base = CLASSES[kind][0].from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert equal(logits(model, ids), peer_logits(again, ids))


@KINDS
def test_files_are_pefts(kind, tmp_path):
    """Tensors by names, shapes and dtypes; every field of adapter_config.json, where there is something to say."""
    model, their = pair(kind, tmp_path, {}, {})
    minift.save(model, None, tmp_path / "ours")
    their.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / f / peft_format.WEIGHTS) for f in ("ours", "theirs"))
    kinds = {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == kinds
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())
    ours, theirs = (json.loads((tmp_path / f / peft_format.CONFIG).read_text()) for f in ("ours", "theirs"))
    assert theirs.keys() - ours.keys() == {"auto_mapping", "peft_version", "revision"}  # who wrote it, and from what
    assert not ours.keys() - theirs.keys()
    for key in ours.keys() - {"base_model_name_or_path", "modules_to_save"}:
        assert as_set(ours[key]) == as_set(theirs[key]), key
    # PEFT names what it would train of any model; we what there is
    assert set(ours["modules_to_save"] or ()) <= set(theirs["modules_to_save"] or ())


def as_set(value):
    return set(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    "options, targets, feedforward",
    [
        ({"targets": "key"}, ["key"], []),
        ({"targets": FIRST}, FIRST, ["output.dense"]),
        (
            {"targets": "key,output.dense", "exclude": "attention.output.dense"},
            ["key", "output.dense"],
            ["output.dense"],
        ),
        ({"targets": "dense", "layers": (1,)}, [LAYER + name for name in DENSE], [LAYER + name for name in DENSE[::2]]),
    ],
    ids=str,
)
def test_the_names_in_a_file(options, targets, feedforward, tmp_path):
    """As they were given, if PEFT takes them so: feedforward_modules among target_modules. Else every layer's own."""
    model, _ = pair("bert", tmp_path, options, {})
    minift.save(model, None, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / peft_format.CONFIG).read_text())
    assert (written["target_modules"], written["feedforward_modules"]) == (targets, feedforward)


def test_an_adapter_for_a_body_alone(tmp_path):
    """Its names and regular expressions have no prefix; the model that gets it has a head."""
    peer(transformers.BertModel, tmp_path / "base", scale=0.15)
    base = transformers.BertModel.from_pretrained(tmp_path / "base")
    patterns = {
        "target_modules": r"encoder\..*(key|output\.dense)",
        "feedforward_modules": r"encoder\..*\.output.dense",
    }
    their = peft.get_peft_model(base, peft.IA3Config(**patterns)).eval()
    randomise(their)
    their.save_pretrained(tmp_path / "adapter")
    configure(tmp_path / "adapter" / peft_format.CONFIG, base_model_name_or_path=str(tmp_path / "base"))
    ids = random_ids([9, 5])
    for task in (None, "classify"):
        model, _ = minift.load(tmp_path / "adapter", task=task)
        states = model(pack([sequence(i, x) for i, x in enumerate(ids)]))
        with torch.no_grad():
            want = torch.cat([their(input_ids=torch.tensor([x])).last_hidden_state[0] for x in ids])
        assert equal(states, want)


def test_tensors_with_the_adapters_name(tmp_path):
    """As in a state dict that was saved by hand."""
    model, _ = pair("gpt2", tmp_path, {}, {})
    randomise(model)
    minift.save(model, None, tmp_path / "adapter")
    path = tmp_path / "adapter" / peft_format.WEIGHTS
    save_file({f"{name}.default": tensor for name, tensor in load_file(path).items()}, path)
    again, _ = minift.load(tmp_path / "adapter")
    ids = random_ids([9])
    assert torch.equal(logits(again, ids), logits(model, ids))


# what is refused


@pytest.fixture
def saved(tmp_path):
    """A good adapter folder, of a BERT with a classifier."""
    model, _ = pair("bert", tmp_path, {}, {})
    minift.save(model, None, tmp_path / "adapter")
    return tmp_path / "adapter"


KEY = "base_model.model.bert.encoder.layer.1.attention.self.key.ia3_l"
DOWN = "base_model.model.bert.encoder.layer.0.output.dense.ia3_l"


@pytest.mark.parametrize(
    "fault, words",
    [
        ("at the other end", rf"{KEY} is \(1, 32\); expected \(32, 1\)"),
        ("without an axis", rf"{DOWN} is \(37,\); expected \(1, 37\)"),
        ("width", rf"{DOWN} is \(1, 36\); expected \(1, 37\)"),
        ("missing", rf"{KEY} is missing; expected \(32, 1\)"),
        ("nan", f"{KEY} has numbers that are not finite"),
        ("whole numbers", f"{KEY} is torch.int64; expected floating-point numbers"),
        ("extra", r"base_model.model.bert.pooler.dense.ia3_l \(32, 1\) belongs to no adapted layer"),
        ("lora", r"attention.self.key.lora_A.weight \(4, 32\) belongs to no adapted layer"),
        ("head", r"base_model.model.classifier.weight is \(5, 32\); expected \(2, 32\)"),
    ],
)
def test_ill_formed_weights_are_refused_by_name(saved, fault, words):
    path = saved / peft_format.WEIGHTS
    tensors = load_file(path)
    if fault == "missing":
        del tensors[KEY]
    changed = {
        "at the other end": {KEY: torch.ones(1, 32)},
        "without an axis": {DOWN: torch.ones(37)},
        "width": {DOWN: torch.ones(1, 36)},
        "nan": {KEY: torch.full((32, 1), torch.nan)},
        "whole numbers": {KEY: torch.ones(32, 1, dtype=torch.int64)},
        "extra": {"base_model.model.bert.pooler.dense.ia3_l": torch.ones(32, 1)},
        "lora": {KEY.replace("ia3_l", "lora_A.weight"): torch.ones(4, 32)},
        "head": {"base_model.model.classifier.weight": torch.zeros(5, 32)},
    }
    save_file(tensors | changed.get(fault, {}), path)
    with pytest.raises(InputError, match=words):
        minift.load(saved)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"use_factors": True}, "use_factors is True, an option that is not known here"),
        ({"ia3_plus_config": {"a": 1}}, "ia3_plus_config is {'a': 1}, an option that is not known here"),
        ({"feedforward_modules": 3}, "feedforward_modules is '3'; expected a string or a list of names"),
        ({"feedforward_modules": "(dense"}, "feedforward_modules is '.dense': not a regular expression"),
        ({"feedforward_modules": ["key"]}, r"key.ia3_l is \(32, 1\); expected \(1, 32\)"),
        ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'; expected a list of names"),
        ({"modules_to_save": ["position_embeddings"]}, "modules_to_save names position_embeddings"),
        ({"target_modules": ["nothing"]}, "no layer has such a name"),
        ({"target_modules": ["key"]}, "value.ia3_l .* belongs to no adapted layer"),
        ({"base_model_name_or_path": None}, "no base_model_name_or_path"),
        ({"peft_type": "LORA"}, "init_ia3_weights is True, an option that is not known here"),
    ],
    ids=str,
)
def test_what_the_engine_lacks_is_refused_by_name(saved, values, words):
    configure(saved / peft_format.CONFIG, **values)
    with pytest.raises(InputError, match=words):
        minift.load(saved)


def test_fields_that_are_not_known_or_not_there_do_no_harm(saved):
    """Without its names of layers a file means PEFT's default for the family, as there."""
    path = saved / peft_format.CONFIG
    config = json.loads(path.read_text())
    for key in ("target_modules", "feedforward_modules", "exclude_modules", "init_ia3_weights", "fan_in_fan_out"):
        del config[key]
    path.write_text(json.dumps(config | {"a_field_of_the_future": 3}))
    model, _ = minift.load(saved)
    assert model.report.adapter == 10 and "a_field_of_the_future" in str(model.report)
    assert model.adapter.feedforward == ("output.dense",)


@pytest.mark.parametrize("method, other", [("lora", "ia3"), ("ia3", "lora"), ("dora", "ia3"), ("full", "ia3")])
def test_an_adapter_of_another_kind_is_not_trained_further(method, other, tmp_path):
    model, _ = minift.load(small_bert(tmp_path / "model"), task="classify")
    adapt(model, other)
    with pytest.raises(InputError, match=f"--method is {method}, but the model has an adapter; expected {other}"):
        adapt(model, method)


# merging, and what was learned


@pytest.mark.parametrize("base", ["", "nf4"])
@pytest.mark.parametrize("into", ["original", "dequantized", "nf4"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_merging(kind, base, into, tmp_path):
    """Factors go into weight and bias: exactly, unless the weight is another than the one trained beside."""
    cls, task, _ = CLASSES[kind]
    peer(cls, tmp_path / "base", scale=0.15)
    model, _ = minift.load(tmp_path / "base", task=task, base=base)
    adapt(model, "ia3")
    randomise(model)
    minift.save(model, None, tmp_path / "adapter")
    out = tmp_path / "merged"
    merged, _, cost = minift.merge(minift.MergeConfig(model=str(tmp_path / "adapter"), out=str(out), into=into))
    assert len(cost.layers) == (8 if kind == "bert" else 4) and merged.adapter is None
    ids = random_ids([9, 5])
    exact = into == "dequantized" or into == "original" and not base
    if exact:
        assert cost.logits < 1e-5 and max(cost.layers.values()) < 1e-6
        assert equal(logits(merged, ids), logits(model, ids), 1e-5)
    else:
        assert 0.01 < min(cost.layers.values()) < max(cost.layers.values()) < 0.5 and cost.logits > 1e-4
    if into == "original" and base:  # the factors on the weights before packing, and on the bias once
        other, _ = minift.load(tmp_path / "base", task=task)
        adapt(other, "ia3")
        for mine, theirs in zip(peft_format.tensors(other).values(), peft_format.tensors(model).values(), strict=True):
            with torch.no_grad():
                mine.copy_(theirs)
        assert equal(logits(merged, ids), logits(other, ids), 1e-5)
    minift.save(merged, None, out)
    again, _ = minift.load(out, task=task, fresh_head=False)
    assert torch.allclose(logits(again, ids), logits(merged, ids), atol=1e-6)


def test_merging_leaves_a_plain_model(tmp_path):
    model, _ = minift.load(small_bert(tmp_path / "model"), task="classify")
    names = set(dict(model.named_parameters()))
    adapt(model, "ia3", targets="all-linear")
    merge_layers(model, "dequantized")
    assert set(dict(model.named_parameters())) == names and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("base", ["", "nf4"])
def test_what_was_learned(base, tmp_path):
    """The difference of the matrices; nothing at first."""
    model, _ = minift.load(small_bert(tmp_path / "model"), task="classify", base=base)
    adapt(model, "ia3")
    assert [(u.norm, u.effective_rank) for u in learned(model)] == [(0, 0)] * 8
    randomise(model)
    for u, (name, layer) in zip(learned(model), wrappers(model).items(), strict=True):
        frozen = layer.frozen.matrix(torch.float32).clone()
        update = (layer.scaling.detach() - 1) * frozen
        assert u.layer == model.hub_name(name) and u.rank == 32 and 1 < u.effective_rank <= 32
        assert u.norm == pytest.approx((update.norm() / frozen.norm()).item(), rel=1e-4)
        assert u.singular[0] == pytest.approx(torch.linalg.matrix_norm(update, 2).item(), rel=1e-4)


# whole runs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """By kind: the options of a short run, without --out; a BERT on reviews, a GPT-2 of bytes on prompts."""
    folder = tmp_path_factory.mktemp("jobs")
    small_bert(folder / "bert")
    small_gpt2(folder / "gpt2")
    lines = [json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) for i in range(40)]
    (folder / "sums.jsonl").write_text("\n".join(lines) + "\n")
    found = {
        "bert": ("classify", str(reviews(folder / "train.tsv", 40))),
        "gpt2": ("complete", str(folder / "sums.jsonl")),
    }
    return {
        kind: ["train", "--model", str(folder / kind), "--task", task, "--data", data, "--method", "ia3"]
        + ["--epochs", "2", "--save-every", "4", "--keep", "9"]
        for kind, (task, data) in found.items()
    }


def losses(out) -> list[float]:
    return [json.loads(line)["train/loss"] for line in open(out / "metrics.jsonl")]


@pytest.mark.parametrize("more", [[], ["--base", "nf4"]], ids=["whole", "nf4"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run(kind, more, jobs, tmp_path, capsys):
    """It learns; eval gives the last validation's figures; a resumed run its bits, a split one its curve."""
    data = jobs[kind][jobs[kind].index("--data") + 1]
    job = [*jobs[kind], *more, "--valid", data]
    whole, half, split = tmp_path / "whole", tmp_path / "half", tmp_path / "split"
    assert cli.main([*job, "--out", str(whole)]) == 0
    rows = [json.loads(line) for line in open(whole / "metrics.jsonl")]
    assert rows[0]["train/learning_rate"] == 3e-3 and rows[9]["eval/loss"] < rows[4]["eval/loss"]
    capsys.readouterr()
    task = ["--task", job[job.index("--task") + 1]]
    assert cli.main(["eval", "--model", str(whole / "last"), *task, "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(rows[-1]["eval/loss"], abs=1e-5)

    assert cli.main([*job, "--out", str(half)]) == 0
    for path in (half / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > 4:
            shutil.rmtree(path)
    assert cli.main(["train", "--resume", "--out", str(half)]) == 0
    assert losses(half) == losses(whole)
    name = f"last/{peft_format.WEIGHTS}"
    assert (half / name).read_bytes() == (whole / name).read_bytes()

    assert cli.main([*job, "--out", str(split), "--tokens", "30"]) == 0
    assert losses(split) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_is_used_inspected_and_merged(kind, jobs, tmp_path, capsys):
    out, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    assert cli.main([*jobs[kind], "--out", out]) == 0
    if kind == "bert":
        use = ["predict", "--text", "a good film"]
    else:
        use = ["generate", "--prompt", "3+1=", "--max-tokens", "5"]
    said = []
    for model in (out, merged):
        capsys.readouterr()
        if model == merged:
            assert cli.main(["merge", "--model", out, "--out", merged]) == 0
            assert "logits: relative error" in capsys.readouterr().out
        assert cli.main([*use, "--model", model]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0].keys() == said[1].keys()
    for key in said[0].keys() & {"label", "completion"}:
        assert said[0][key] == said[1][key]
    assert cli.main(["inspect", "--model", out]) == 0
    told = capsys.readouterr().out.split("learned on top of")[1]
    assert ("output.dense" if kind == "bert" else "transformer.h.1.mlp.c_proj") in told
    CLASSES[kind][0].from_pretrained(merged)


def test_a_run_from_python_can_be_repeated_by_its_config(jobs, tmp_path):
    """Layers by number too: their names are in the file."""
    job = jobs["bert"]
    source, data = job[job.index("--model") + 1], job[job.index("--data") + 1]
    model, tokenizer = minift.load(source, task="classify", labels=["blame", "praise"])
    adapt(model, "ia3", targets="key,dense", layers=(1,), exclude="intermediate.dense")
    assert len(scaled(model)) == 3
    minift.train(model, tokenizer, minift.TrainConfig(data=data, out=str(tmp_path / "a"), epochs=1))
    assert cli.main(["train", "--config", str(tmp_path / "a/config.json"), "--out", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    again, _ = minift.load(tmp_path / "b")
    assert scaled(again) == scaled(model)


def test_training_goes_on_from_an_adapter(jobs, tmp_path, capsys):
    first, second = tmp_path / "a", tmp_path / "b"
    assert cli.main([*jobs["bert"], "--out", str(first)]) == 0
    onward = [*jobs["bert"], "--out", str(second)]
    onward[2] = str(first)
    assert cli.main(onward) == 0
    assert losses(second)[0] != losses(first)[0]
    onward[onward.index("ia3")] = "lora"
    onward[-1] = str(tmp_path / "c")
    assert cli.main(onward) == 1
    assert "--method is lora, but the model has an adapter; expected ia3" in capsys.readouterr().err
