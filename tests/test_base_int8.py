"""A base in eight bits: runs on it, files of bitsandbytes both ways, merging, what is refused.

python -m pytest tests/test_base_int8.py
"""

import json

import numpy as np
import pytest
import torch
import transformers
from folders import configure, rewrite, weights_in, without, write
from helpers import fails, metrics, peer, peer_logits, random_ids, sequence, works
from safetensors.torch import load_file

import minift
from minift.data.batch import pack
from minift.errors import InputError
from minift.layers.int8 import Packed as Int8Linear
from minift.ops import int8, native
from minift.ops.linear import product

pytestmark = pytest.mark.slow

CLASSES = {
    "bert": (transformers.BertForSequenceClassification, "classify", {"hidden_size": 64, "intermediate_size": 128}),
    "gpt2": (transformers.GPT2LMHeadModel, "complete", {"n_embd": 64}),
}
FAMILY = pytest.mark.parametrize("family", CLASSES)
W = "bert.encoder.layer.0.attention.self.query"


def base(family, folder):
    """A random model of the family, saved in `folder`."""
    cls, _, sizes = CLASSES[family]
    return peer(cls, folder, scale=0.15, **sizes)


def logits(model, family, ids=None):
    """On three sequences, and their ids."""
    ids = random_ids([9, 1, 17]) if ids is None else ids
    rows = {"bert": lambda x: [0], "gpt2": lambda x: list(range(len(x)))}[family]
    return model.logits(pack([sequence(i, x, rows=rows(x)) for i, x in enumerate(ids)])), ids


def theirs(family, folder, **more):
    """transformers' model with bitsandbytes' layers."""
    return CLASSES[family][0].from_pretrained(folder, dtype=torch.float32, device_map="cpu", **more).eval()


@FAMILY
def test_it_computes_nearly_what_the_floats_do(family, tmp_path):
    base(family, tmp_path / "base")
    whole, _ = minift.load(tmp_path / "base", task=CLASSES[family][1])
    packed, _ = minift.load(tmp_path / "base", task=CLASSES[family][1], base="int8")
    assert sum(isinstance(m, Int8Linear) for m in packed.modules()) == {"bert": 12, "gpt2": 8}[family]
    want, _ = logits(whole, family)
    found, _ = logits(packed, family)
    assert (found - want).norm() < 0.05 * want.norm()


@FAMILY
def test_an_adapter_has_the_same_bits_however_products_are_made(family, tmp_path, monkeypatch):
    """By the instructions for it (where there are), by the kernel or by float32: sums of codes are exact in each."""
    base(family, tmp_path / "base")
    task = CLASSES[family][1]
    ways = [int8.multiply_here, int8.multiply_by_floats]
    if int8.has_int_mm():
        ways.append(torch._int_mm)
    ids = random_ids([9, 30, 17, 24])
    examples = [sequence(i, x, [0], [i % 2]) for i, x in enumerate(ids)]
    if task == "complete":
        examples = [sequence(i, x, list(range(5, len(x))), x[5:]) for i, x in enumerate(ids)]
    found = []
    for way in ways:
        calls = []
        monkeypatch.setattr(int8, "multiply", lambda x, w, way=way, calls=calls: calls.append(1) or way(x, w))
        model, _ = minift.load(tmp_path / "base", task=task, base="int8")
        minift.add_lora(model)
        job = minift.prepare(model, task=task)
        for step in range(3):
            minift.train_step(job, examples, step, 1e-2)
        assert calls
        found.append([p.detach().clone() for p in job.parameters])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


SPLITS = {  # --tokens and threads
    "whole": (0, 2),
    "some at once": (80, 1),
    "few at once": (30, 3),
    "each by itself": (1, 2),
}
CLASSIFIERS = {
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2ForSequenceClassification,
    "roberta": transformers.RobertaForSequenceClassification,  # whose head has a layer more that learns
    "distilbert": transformers.DistilBertForSequenceClassification,
}
SMALL = {
    "roberta": dict(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72,
        max_position_embeddings=60, type_vocab_size=1, pad_token_id=1,
    ),
    "distilbert": dict(vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=72, max_position_embeddings=60),
    "gpt2": dict(n_embd=64, pad_token_id=0),
    "bert": dict(hidden_size=64, intermediate_size=72),
}  # fmt: skip


def adapter_after(folder, task, examples, split, **options):
    """What is trained, after four steps."""
    tokens, threads = SPLITS[split]
    torch.set_num_threads(threads)
    model, _ = minift.load(folder, task=task, base="int8")
    minift.add_lora(model, **options)
    job = minift.prepare(model, task=task, tokens=tokens, device="cpu")
    for step in range(4):
        minift.train_step(job, examples, step, 1e-2)
    return [p.detach().clone() for p in job.parameters]


@pytest.fixture
def threads():
    """Puts back the number of threads; skips where there is no compiler, without which nothing is promised."""
    if native.kernel("lora", torch.zeros(1)) is None:
        pytest.skip("there are no kernels here")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_an_adapter_has_the_same_bits_however_a_step_is_split(family, tmp_path, threads):
    """Dropout on; lengths from 1 on, odd widths, more ranks than the kernel takes at once."""
    peer(CLASSIFIERS[family], tmp_path / "base", scale=0.15, num_labels=3, **SMALL[family])
    ids = random_ids([9, 30, 1, 24, 2, 17, 30, 8, 40, 3, 11], 97)
    examples = [sequence(i, [n + 2 for n in x], [0], [i % 3]) for i, x in enumerate(ids)]
    for options in (dict(rank=3), dict(rank=20, targets="all-linear", dropout=0.0)):
        found = [adapter_after(tmp_path / "base", "classify", examples, split, **options) for split in SPLITS]
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


def test_a_language_model_has_them_too_where_the_librarys_product_does(tmp_path, threads):
    """The product with the vocabulary is a library's: asked first whether it minds how many rows there are."""
    model = peer(transformers.GPT2LMHeadModel, tmp_path / "base", scale=0.15, n_embd=64)
    table = model.transformer.wte.weight.detach()
    x = torch.randn(320, 64)
    dz = torch.randn(320, 99)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for w, rows in ((table, x), (table.t(), dz)):
            parts = torch.cat([product(part, w) for part in (rows[:64], rows[64:192], rows[192:])])
            if not torch.equal(product(rows, w), parts):
                pytest.skip("this CPU's product of many rows differs from that of few")
    ids = random_ids([9, 30, 2, 24, 17, 30, 8, 40, 3, 11])
    examples = [sequence(i, x, list(range(1, len(x))), x[1:]) for i, x in enumerate(ids)]
    found = [adapter_after(tmp_path / "base", "complete", examples, split) for split in SPLITS]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@FAMILY
def test_transformers_loads_ours(family, tmp_path):
    """And computes nearly the same; bitsandbytes keeps other elements apart."""
    pytest.importorskip("bitsandbytes")
    base(family, tmp_path / "base")
    model, _ = minift.load(tmp_path / "base", task=CLASSES[family][1], base="int8")
    minift.save(model, None, tmp_path / "ours")
    want, ids = logits(model, family)
    assert (peer_logits(theirs(family, tmp_path / "ours"), ids) - want).norm() < 0.05 * want.norm()
    again, _ = minift.load(tmp_path / "ours", task=CLASSES[family][1])
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@FAMILY
def test_we_load_theirs_and_write_it_back_byte_for_byte(family, tmp_path):
    pytest.importorskip("bitsandbytes")
    base(family, tmp_path / "base")
    skipped = ["classifier", "bert.pooler.dense", "lm_head"]
    options = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    theirs(family, tmp_path / "base", quantization_config=options).save_pretrained(tmp_path / "theirs")
    model, _ = minift.load(tmp_path / "theirs", task=CLASSES[family][1])
    file = load_file(tmp_path / "theirs/model.safetensors")
    packed = [(name, m) for name, m in model.named_modules() if isinstance(m, Int8Linear)]
    assert len(packed) == {"bert": 12, "gpt2": 8}[family]
    for name, layer in packed:
        hub = model.hub_name(name)
        exact = file[f"{hub}.weight"].double() * file[f"{hub}.SCB"].double()[:, None] / 127
        assert torch.allclose(layer.matrix(torch.float64), exact, rtol=1e-6)

    minift.save(model, None, tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert set(back) == set(file)
    assert all(torch.equal(back[name], tensor.to(back[name].dtype)) for name, tensor in file.items())
    assert all(back[name].dtype == tensor.dtype for name, tensor in file.items() if not tensor.is_floating_point())


@pytest.fixture
def packed(tmp_path):
    """A folder with a BERT in eight bits."""
    base("bert", tmp_path / "base")
    model, _ = minift.load(tmp_path / "base", task="classify", base="int8")
    minift.save(model, None, tmp_path / "packed")
    return tmp_path / "packed"


def changed(name, tensor):
    return lambda tensors: tensors | {name: tensor(tensors[name])}


@pytest.mark.parametrize("change, words", [
    (lambda t: without(t, f"{W}.SCB"), "is torch.int8 in the file; expected floating-point"),
    (lambda t: without(t, f"{W}.weight"), "is in 8 bits, but without weight"),
    (changed(f"{W}.weight_format", lambda t: t + 2), "has weight_format 2; expected 0"),
    (changed(f"{W}.SCB", lambda t: t[1:]), r"has a SCB that is \(63,\) torch.float32; expected \(64,\)"),
    (changed(f"{W}.SCB", lambda t: -t), "has a SCB with numbers that are negative"),
    (changed(f"{W}.SCB", lambda t: t * torch.nan), "has a SCB with numbers that are negative or not finite"),
    (changed(f"{W}.weight", lambda t: t[:, 1:].contiguous()), r"has a weight that is \(64, 63\) torch.int8"),
    (changed(f"{W}.weight", lambda t: t.float()), "torch.float32; expected .* torch.int8"),
])  # fmt: skip
def test_ill_formed_files_are_refused(packed, change, words):
    rewrite(packed, change(weights_in(packed)))
    with pytest.raises(InputError, match=words):
        minift.load(packed, task="classify")


def test_a_config_that_says_nothing_of_it_is_refused(packed):
    configure(packed, quantization_config=...)
    with pytest.raises(InputError, match="is torch.int8 in the file|which config.json says nothing of"):
        minift.load(packed, task="classify")


def test_another_way_to_pack_it_is_refused(packed):
    with pytest.raises(InputError, match="is in int8 already; expected the original for --base nf4"):
        minift.load(packed, task="classify", base="nf4")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A model with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("desk")
    words = "a good film with a bad end and no plot at all but a lovely cast".split()
    rows = [{"text": " ".join(words[i % 5 :: 1 + i % 3]), "label": i % 2} for i in range(48)]
    write(folder / "data.jsonl", *rows)
    write(folder / "text.txt", *(" ".join(words) for _ in range(40)))
    works("new --data {f}/text.txt --out {f}/shape --width 64 --layers 2 --heads 2 --positions 64", f=folder)
    works("train --model {f}/shape --init random --data {f}/data.jsonl --steps 2 --out {f}/run", f=folder)
    return folder


LINE = "train --model {f}/run/last --data {f}/data.jsonl --batch 8 --precision fp32"


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "head", "lora-fa", "pissa"])
def test_it_trains_as_a_float_base_does(method, desk, tmp_path):
    line = f"{LINE} --method {method} --steps 6 --lr 1e-3"
    works(f"{line} --out {{out}}/float", f=desk, out=tmp_path)
    works(f"{line} --base int8 --out {{out}}/int8", f=desk, out=tmp_path)
    losses = [[step["train/loss"] for step in metrics(tmp_path / name)] for name in ("float", "int8")]
    assert losses[0] != losses[1] and torch.allclose(*map(torch.tensor, losses), rtol=0.03)
    works("eval --model {out}/int8 --data {f}/data.jsonl", f=desk, out=tmp_path)


def test_a_run_goes_on_to_the_bit(desk, tmp_path):
    line = f"{LINE} --method lora --base int8 --save-every 3"
    works(f"{line} --steps 6 --out {{out}}/whole", f=desk, out=tmp_path)
    works(f"{line} --steps 6 --out {{out}}/cut", f=desk, out=tmp_path)
    for path in sorted((tmp_path / "cut/checkpoints").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    works(f"{line} --steps 6 --out {{out}}/cut --resume", f=desk, out=tmp_path)
    names = "last/adapter_model.safetensors", "last/adapter_config.json"
    assert all((tmp_path / "cut" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)


def test_its_adapter_and_what_it_merges_into(desk, tmp_path):
    works(f"{LINE} --method lora --base int8 --steps 4 --lr 1e-2 --out {{out}}/run", f=desk, out=tmp_path)
    config = json.loads((tmp_path / "run/last/minift-model.json").read_text())
    assert config["minift"]["base"] == "int8"
    trained, _ = minift.load(tmp_path / "run", task="classify")
    assert any(isinstance(m, Int8Linear) for m in trained.modules())
    ids = [np.array([1, 5, 9, 7]), np.array([3]), np.arange(5, 15)]
    want, _ = logits(trained, "bert", ids)
    for into, near in (("dequantized", 0.02), ("original", 0.05), ("int8", 0.05), ("nf4", 0.6)):
        said = works(f"merge --model {{out}}/run --out {{out}}/{into} --into {into}", f=desk, out=tmp_path)
        assert "logits" in said.out
        merged, _ = minift.load(tmp_path / into, task="classify")
        found, _ = logits(merged, "bert", ids)
        assert (found - want).norm() < near * want.norm(), into
        is_packed = any(isinstance(m, Int8Linear) for m in merged.modules())
        assert is_packed == (into == "int8")


def test_what_is_refused(desk, tmp_path):
    line = f"{LINE} --base int8 --out {{out}}/run --method"
    fails(f"{line} full", "weights in 8 bits do not learn", f=desk, out=tmp_path, code=2)
    fails(f"{line} loftq", "expected --base nf4", f=desk, out=tmp_path, code=2)
    line = line.replace("fp32", "bf16")
    fails(f"{line} lora --graph", "--base int8, whose products cannot be recorded", f=desk, out=tmp_path)


def test_a_plan_counts_its_products(desk):
    """As many FLOPs as with floats, and a quarter of the bytes for the weights of layers."""
    plans = []
    for base in ("auto", "int8"):
        said = works(f"plan --model {{f}}/run/last --data {{f}}/data.jsonl --method lora --base {base} --json", f=desk)
        plans.append(json.loads(said.out.splitlines()[-1]))
    assert plans[1]["flops"] == pytest.approx(plans[0]["flops"], rel=1e-3)
    layers = 2 * (4 * 64 * 64 + 2 * 64 * 256)
    saved = plans[0]["kinds"]["frozen weights"] - plans[1]["kinds"]["frozen weights"]
    assert saved == pytest.approx(3 * layers, rel=0.05)
