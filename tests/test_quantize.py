"""A base in four bits: files of bitsandbytes both ways, what loading takes, what is refused.

python -m pytest tests/test_quantize.py
"""

import json

import pytest
import torch
import transformers
from folders import configure, rewrite, weights_in, with_nan, without
from helpers import nf4, peer, peer_logits, python, random_ids, sequence
from safetensors.torch import load_file

import minift
from minift.data.batch import pack
from minift.errors import InputError
from minift.layers.nf4 import MARK as STATE
from minift.layers.nf4 import Packed as NF4Linear
from minift.ops.dropout import SILENT
from minift.tasks import task_named

pytestmark = pytest.mark.slow

pytest.importorskip("bitsandbytes")
CLASSES = {
    "bert": (transformers.BertForSequenceClassification, "classify", {"hidden_size": 64, "intermediate_size": 128}),
    "gpt2": (transformers.GPT2LMHeadModel, "complete", {"n_embd": 64}),
}
WITHOUT = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt2": ("embd_pdrop", "attn_pdrop", "resid_pdrop"),
}
FAMILY = pytest.mark.parametrize("family", CLASSES)


@pytest.fixture(autouse=True)
def no_compilation():
    """bitsandbytes compiles some functions for every shape anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def base(family, folder):
    """A random model of the family, saved in `folder`."""
    cls, _, sizes = CLASSES[family]
    return peer(cls, folder, scale=0.15, **sizes)


def theirs(family, folder, **quantization):
    """transformers' model. In training mode without dropout, for in eval mode bitsandbytes may compute in bf16."""
    off = dict.fromkeys(WITHOUT[family], 0.0)
    return (
        CLASSES[family][0].from_pretrained(folder, dtype=torch.float32, device_map="cpu", **off, **quantization).train()
    )


def same_logits(ours, peers, family) -> bool:
    """On three sequences."""
    ids = random_ids([9, 1, 17])
    rows = {"bert": lambda x: [0], "gpt2": lambda x: list(range(len(x)))}[family]
    mine = ours.logits(pack([sequence(i, x, rows=rows(x)) for i, x in enumerate(ids)]))
    return torch.allclose(mine, peer_logits(peers, ids), atol=1e-5)


@pytest.mark.slow
@FAMILY
def test_transformers_loads_ours(family, tmp_path):
    base(family, tmp_path / "base")
    model, _ = minift.load(tmp_path / "base", task=CLASSES[family][1], base="nf4")
    minift.save(model, None, tmp_path / "ours")
    assert same_logits(model, theirs(family, tmp_path / "ours"), family)
    again, _ = minift.load(tmp_path / "ours", task=CLASSES[family][1])
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


@FAMILY
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_load_theirs_and_write_it_back_byte_for_byte(family, double, dtype, tmp_path):
    """With and without double quantisation, packed from float32 or from bf16; heads they left in float."""
    base(family, tmp_path / "base")
    packed = CLASSES[family][0].from_pretrained(
        tmp_path / "base", dtype=dtype, device_map="cpu", quantization_config=nf4(bnb_4bit_use_double_quant=double)
    )
    packed.save_pretrained(tmp_path / "theirs")
    model, _ = minift.load(tmp_path / "theirs", task=CLASSES[family][1])
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == {"bert": 12, "gpt2": 8}[family]
    if dtype == torch.float32:
        assert same_logits(model, theirs(family, tmp_path / "theirs"), family)
    minift.save(model, None, tmp_path / "ours")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert set(got) == set(want)
    for name, tensor in want.items():
        if tensor.dtype == torch.uint8:  # codes, scales and the JSON of the state
            assert torch.equal(got[name], tensor), name
        else:
            assert torch.equal(got[name], tensor.float()), name


def test_a_packed_pooler_and_classifier(tmp_path):
    """transformers packs these too unless told not to, and the peer's recipe then crashes; here it trains."""
    base("bert", tmp_path / "base")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = CLASSES["bert"][0].from_pretrained(
        tmp_path / "base", dtype=torch.float32, device_map="cpu", quantization_config=quantization
    )
    packed.save_pretrained(tmp_path / "theirs")
    model, _ = minift.load(tmp_path / "theirs", task="classify")
    assert isinstance(model.head.pooler, NF4Linear) and not isinstance(model.head.out, NF4Linear)
    assert same_logits(model, theirs("bert", tmp_path / "theirs"), "bert")
    minift.add_lora(model)
    batch = pack([sequence(0, random_ids([9])[0], rows=[0])])
    loss, _ = task_named("classify").loss(model, batch, SILENT, 0.0)
    loss.backward()
    assert model.head.out.weight.requires_grad
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@FAMILY
def test_packing_while_loading_and_after(family, tmp_path):
    """The same bytes; heads, pooler and embeddings stay in float."""
    base(family, tmp_path / "base")
    task = CLASSES[family][1]
    while_, _ = minift.load(tmp_path / "base", task=task, base="nf4")
    after, _ = minift.load(tmp_path / "base", task=task)
    minift.quantize(after)
    for (name, a), (_, b) in zip(while_.state_dict().items(), after.state_dict().items(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    kinds = {name for name, t in while_.state_dict().items() if t.dtype == torch.uint8}
    assert kinds and all(name.startswith("body.") and ("layer" in name or ".h." in name) for name in kinds)
    assert while_.size() == sum(p.numel() for p in minift.load(tmp_path / "base", task=task)[0].parameters())


@pytest.mark.slow
def test_the_size_of_gpt2(tmp_path):
    """The linear layers of GPT-2 small: 340 MB in float32, less than 44 MB packed."""
    from minift.models import gpt2

    with torch.device("meta"):
        body = gpt2.Body(gpt2.Config())
    shapes = [m.weight.shape for m in body.modules() if hasattr(m, "matrix")]
    assert sum(a * b * 4 for a, b in shapes) == pytest.approx(340e6, rel=0.01)
    with torch.device("meta"):
        packed = sum(b.nbytes for a, c in shapes for b in NF4Linear(c, a, bias=False).buffers())
    assert packed < 44e6


LOADING = """
import sys, threading, time
import torch
import minift
from minift.ops import nf4
torch.set_num_threads(1)
def anonymous():
    return 1024 * int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])
minift.load(sys.argv[2], task="complete", base="nf4")  # whatever is made once
before, peak, done = anonymous(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
model, _ = minift.load(sys.argv[1], task="complete", base="nf4")
done.append(1)
thread.join()
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
largest = max(m.in_features * m.out_features * 4 for m in model.modules() if hasattr(m, "matrix"))
print(peak[0] - before, size, largest)
"""


@pytest.mark.slow
def test_loading_takes_the_result_and_one_tensor(tmp_path):
    """A sharded checkpoint, packed on the way in: the peak of anonymous memory, by a thread that watches."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, n_positions=8, n_head=4, bos_token_id=0, eos_token_id=0)
    big = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=1024, n_layer=4, **sizes))
    big.save_pretrained(tmp_path / "big", max_shard_size="30MB")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=1, **sizes)).save_pretrained(
        tmp_path / "small"
    )
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 3
    peak, size, largest = map(int, python(LOADING, tmp_path / "big", tmp_path / "small").split())
    assert largest == 4 * 1024 * 4096 and size < 0.2 * big.num_parameters() * 4
    assert peak < size + largest + (4 << 20)  # and the interpreter's own


# what is refused


@pytest.fixture
def packed(tmp_path):
    """A good file of ours in four bits."""
    base("bert", tmp_path / "base")
    model, _ = minift.load(tmp_path / "base", task="classify", base="nf4")
    minift.save(model, None, tmp_path / "packed")
    return tmp_path / "packed"


W = "bert.encoder.layer.1.attention.self.query.weight"


def state(tensors, **changes) -> dict[str, torch.Tensor]:
    """The quant_state of W with other values."""
    found = json.loads(bytes(tensors[S].tolist())) | changes
    return {S: torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)}


S, CODE, SCALES = f"{W}.{STATE}", f"{W}.quant_map", f"{W}.nested_absmax"
TENSORS = {  # what becomes of the tensors, and what is said of it
    "no absmax": (lambda t: without(t, f"{W}.absmax"), r" is in 4 bits, but without absmax"),
    "no state": (lambda t: without(t, S), rf" .*4 bits|{W}.*expected"),
    "short codes": (lambda t: t | {W: t[W][:9].clone()}, r" is \(9, 1\) in the file; expected"),
    "another code": (lambda t: t | {CODE: t[CODE] * 0.5}, r" has a quant_map other than that of NF4"),
    "fp4": (lambda t: t | state(t, quant_type="fp4"), r" has quant_type 'fp4' in its quant_state; expected 'nf4'"),
    "block": (lambda t: t | state(t, blocksize=128), r" has blocksize 128 in its quant_state; expected 64"),
    "nonsense": (lambda t: t | {S: t[S][:7].clone()}, r" has a quant_state that cannot be read"),
    "nan": (lambda t: t | {SCALES: with_nan(t[SCALES])}, r" has a nested_absmax with numbers that are not finite"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_ill_formed_files_are_refused(packed, fault):
    change, words = TENSORS[fault]
    rewrite(packed, change(weights_in(packed)))
    with pytest.raises(InputError, match=W + words):
        minift.load(packed, task="classify")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_nan_is_not_packed(bert, base, dtype):
    name = "bert.encoder.layer.0.attention.self.query.weight"
    tensors = weights_in(bert)
    rewrite(bert, tensors | {name: with_nan(tensors[name]).to(dtype)})
    with pytest.raises(InputError, match=f"{name} has numbers that are not finite"):
        minift.load(bert, task="classify", base=base)


@pytest.mark.parametrize("config, words", [
    (..., "is packed, which config.json says nothing of"),
    ({"quant_method": "gptq", "bits": 4}, "quantization_config is .*; expected bitsandbytes' nf4"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"is \(2048, 1\) in the file; expected \(64, 64\)"),
])  # fmt: skip
def test_a_config_of_other_bits_is_refused(packed, config, words):
    configure(packed, quantization_config=config)
    with pytest.raises(InputError, match=words):
        minift.load(packed, task="classify")
