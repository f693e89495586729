"""The token behind a mask, beside transformers' ...ForMaskedLM: numbers, gradients, training, and both ways of files.

python -m pytest tests/parity/test_masked_models.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from folders import configure, rewrite, weights_in
from helpers import BERT, WORDS, nf4, peer, sequence
from test_families import COMMON, KINDS, lists, write_wordpiece
from test_models import BERTS, LENGTHS, check_gradients, padded
from transformers import AutoModelForMaskedLM

import minift
from minift.checkpoints import loading
from minift.data.batch import pack
from minift.models import family_named
from minift.ops.dropout import Noise
from minift.tasks import fill

CLASSES = {
    "bert": transformers.BertForMaskedLM,
    "roberta": transformers.RobertaForMaskedLM,
    "distilbert": transformers.DistilBertForMaskedLM,
}
SIZES = {"bert": BERT} | {kind: KINDS[kind].sizes for kind in KINDS}
OTHERS = {"bert": BERTS} | {kind: COMMON | KINDS[kind].others for kind in KINDS}
OFF = {"bert": KINDS["roberta"].off} | {kind: KINDS[kind].off for kind in KINDS}
WRITE_TOKENIZER = {"bert": write_wordpiece} | {kind: KINDS[kind].write_tokenizer for kind in KINDS}
DECODER = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "distilbert": "vocab_projector"}
BIAS = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias", "distilbert": "vocab_projector.bias"}
UNTIED = dict(tie_word_embeddings=False)
families = pytest.mark.parametrize("kind", CLASSES)
CASES = [(kind, case) for kind in CLASSES for case in (*OTHERS[kind], "untied")]


def masked_model(kind: str, folder: Path, **changes):
    """A random model of transformers' with its head, saved in a folder."""
    return peer(CLASSES[kind], folder, **SIZES[kind] | changes)


def load(folder: Path, **options):
    """Ours, with its head."""
    return minift.load(folder, task="fill", **options)[0]


IDS = lists(LENGTHS)


@torch.no_grad()
def everywhere(model) -> torch.Tensor:
    """The logits of every token of IDS."""
    return model.logits(pack([sequence(i, x) for i, x in enumerate(IDS)]))


@torch.no_grad()
def peer_everywhere(model) -> torch.Tensor:
    """Theirs, of a padded batch."""
    found = model(**padded(IDS)).logits
    return torch.cat([found[i, : len(x)] for i, x in enumerate(IDS)])


def embedding_of(state: dict) -> str:
    """The name of the word embedding in a file."""
    (name,) = [name for name in state if name.endswith("embeddings.word_embeddings.weight")]
    return name


# numbers


@pytest.mark.parametrize("kind, case", CASES)
def test_logits_loss_and_every_gradient(kind, case, tmp_path):
    """Every third token is asked about, and of one sequence none; the embedding's gradient is the decoder's too."""
    theirs = masked_model(kind, tmp_path, **(OTHERS[kind] | {"untied": UNTIED})[case])
    model = load(tmp_path)
    assert not model.report.unused and not model.report.fresh
    assert (everywhere(model) - peer_everywhere(theirs)).abs().max() <= 1e-5

    rows = [list(range(i % 3, len(x), 3)) if i != 3 else [] for i, x in enumerate(IDS)]
    targets = lists([len(r) for r in rows], seed=1)
    every = enumerate(zip(IDS, rows, targets, strict=True))
    batch = pack([sequence(i, x, rows=r, targets=t) for i, (x, r, t) in every])
    labels = torch.full_like(padded(IDS)["input_ids"], -100)
    for i, (r, t) in enumerate(zip(rows, targets, strict=True)):
        labels[i, r] = torch.tensor(t, dtype=torch.long)
    want = theirs(**padded(IDS), labels=labels)
    loss, right = fill.loss(model, batch, Noise())
    assert batch.n_targets == (labels != -100).sum()
    assert loss.item() / batch.n_targets == pytest.approx(want.loss.item(), abs=1e-5)
    assert right == (want.logits.argmax(-1) == labels).sum()

    want.loss.backward()
    (loss / batch.n_targets).backward()
    if case == "untied" and model.bias_twin:  # theirs has two biases then, and computes with the second
        theirs.get_parameter(BIAS[kind]).grad = theirs.get_parameter(model.bias_twin).grad
    check_gradients(model, theirs)


@families
def test_training_follows_the_peer(kind, tmp_path):
    """Six steps of AdamW on the masks that each step draws, dropout off: the losses, and the weights at the end.

    No draw of this seed shows the padding token, of whose place in a text transformers learns nothing (padding_idx).
    """
    seed = 4
    more = dict(vocab_size=400, max_position_embeddings=SIZES[kind]["max_position_embeddings"] + 60)
    theirs = masked_model(kind, tmp_path, **OFF[kind] | more)
    WRITE_TOKENIZER[kind](tmp_path)
    model, tokenizer = minift.load(tmp_path, task="fill")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in (20, 3, 41, 9, 30, 17)]
    sequences = fill.encode(fill.from_rows(texts), model, tokenizer, 100)

    config = minift.TrainConfig(lr=1e-3, weight_decay=0.1, clip=1.0, seed=seed, task="fill")
    job = minift.prepare(model, config)
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [dict(params=decayed, weight_decay=0.1), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    found = []
    expected = []
    for step in range(6):
        shown = fill.at_step(sequences, seed, step)
        assert not any((text.ids == theirs.config.pad_token_id).any() for text in shown)
        labels = torch.full_like(padded([text.ids.tolist() for text in shown])["input_ids"], -100)
        for i, text in enumerate(shown):
            labels[i, text.rows] = torch.from_numpy(text.targets)
        loss = theirs(**padded([text.ids.tolist() for text in shown]), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        values, _ = minift.train_step(job, sequences, step, 1e-3)
        found.append(values["train/loss"])
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 6
    peers = dict(theirs.named_parameters())
    assert (model.last.bias - peers[BIAS[kind]]).abs().max() < 1e-5
    assert (model.last.weight - theirs.get_output_embeddings().weight).abs().max() < 1e-5


# files


@pytest.mark.parametrize("changes", [{}, UNTIED], ids=["tied", "untied"])
@families
def test_a_saved_folder_is_transformers_own(kind, changes, tmp_path):
    """The same names and numbers as theirs; loaded there without a word, and here."""
    theirs = masked_model(kind, tmp_path / "theirs", **changes)
    model = load(tmp_path / "theirs")
    assert (model.last.weight is model.get_parameter(model.head.tied[1])) == (not changes)
    minift.save(model, None, tmp_path / "ours")
    want = weights_in(tmp_path / "theirs")
    found = weights_in(tmp_path / "ours")
    assert want.keys() == found.keys()
    if changes and model.bias_twin:
        want[BIAS[kind]] = want[model.bias_twin]  # what theirs computes with
    assert all(torch.equal(found[name], want[name]) for name in want)

    again, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is CLASSES[kind]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(peer_everywhere(again.eval()), peer_everywhere(theirs))
    assert torch.equal(everywhere(load(tmp_path / "ours")), everywhere(model))


def changed(state: dict, kind: str, how: str) -> dict:
    """The tensors of a tied checkpoint as other files have them."""
    weight = f"{DECODER[kind]}.weight"
    twin = f"{DECODER[kind]}.bias"
    embedding = embedding_of(state)
    bias = state[BIAS[kind]]
    other = torch.randn(state[embedding].shape, generator=torch.Generator().manual_seed(1))
    if how == "the decoder's weight too":
        return state | {weight: state[embedding]}
    if how == "another weight":
        return state | {weight: other}
    if how == "the decoder's weight alone":
        return {name: tensor for name, tensor in state.items() if name != embedding} | {weight: state[embedding]}
    if how == "two biases":
        return state | {twin: bias.clone()}
    if how == "another bias":
        return state | {twin: bias + other[:, 0]}
    if how == "the decoder's bias alone":
        return {name: tensor for name, tensor in state.items() if name != BIAS[kind]} | {twin: bias}
    assert how == "no bias"
    return {name: tensor for name, tensor in state.items() if name != BIAS[kind]}


HOWS = (
    "the decoder's weight too",
    "another weight",
    "the decoder's weight alone",
    "two biases",
    "another bias",
    "the decoder's bias alone",
    "no bias",
)


@pytest.mark.parametrize("how", HOWS)
@families
def test_files_that_have_the_decoder_otherwise(kind, how, tmp_path):
    """Of whatever stands in the file, the numbers are those of transformers."""
    masked_model(kind, tmp_path)
    rewrite(tmp_path, changed(weights_in(tmp_path), kind, how))
    model = load(tmp_path)
    theirs = CLASSES[kind].from_pretrained(tmp_path).eval()
    assert torch.allclose(everywhere(model), peer_everywhere(theirs), atol=2e-5)
    assert model.tied == (how != "another weight")
    assert model.report.fresh == ([BIAS[kind]] if how == "no bias" else [])
    assert not model.report.unused
    if how == "no bias":
        with pytest.raises(minift.InputError, match=f"{BIAS[kind]}, of the fill head, is missing"):
            load(tmp_path, fresh_head=False)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_bert_base_uncased_layout(wrapper, tmp_path):
    """gamma and beta, the decoder beside the embedding, the head for next sentences, old buffers; in a .bin."""
    theirs = masked_model("bert", tmp_path)
    state = weights_in(tmp_path)
    old = {
        wrapper + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in state.items()
    }
    old[f"{wrapper}cls.predictions.decoder.weight"] = state[embedding_of(state)]
    old[f"{wrapper}cls.predictions.decoder.bias"] = state[BIAS["bert"]]
    old[f"{wrapper}bert.pooler.dense.weight"] = torch.ones(32, 32)
    old[f"{wrapper}bert.pooler.dense.bias"] = torch.ones(32)
    old[f"{wrapper}cls.seq_relationship.weight"] = torch.ones(2, 32)
    old[f"{wrapper}cls.seq_relationship.bias"] = torch.ones(2)
    old[f"{wrapper}bert.embeddings.position_ids"] = torch.arange(40)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    configure(tmp_path, architectures=["BertForPreTraining"], tie_word_embeddings=...)
    model = load(tmp_path, fresh_head=False)
    assert model.tied and not model.report.fresh
    assert sorted(model.report.unused) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    ]
    assert (everywhere(model) - peer_everywhere(theirs)).abs().max() <= 1e-5


@families
def test_a_fresh_head_over_a_body(kind, tmp_path):
    """Of a checkpoint without one: a layer drawn as config.json says, a norm of ones, biases of 0; said, or refused."""
    body = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel}
    peer(body.get(kind, transformers.DistilBertModel), tmp_path, **SIZES[kind])
    model = load(tmp_path, seed=3)
    head = [model.hub_name(f"head.{name}") for name, _ in model.head.named_parameters() if name != "out.weight"]
    assert sorted(model.report.fresh) == sorted(head) and len(head) == 5 and model.tied
    assert not model.last.bias.any() and not model.head.dense.bias.any() and not model.head.norm.bias.any()
    assert torch.equal(model.head.norm.weight, torch.ones(32))
    assert model.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.15)  # of 1,024 numbers: chance is 2 %
    assert torch.equal(load(tmp_path, seed=3).head.dense.weight, model.head.dense.weight)
    with pytest.raises(minift.InputError, match="expected a trained head"):
        load(tmp_path, fresh_head=False)


@families
def test_a_pretrained_size_has_transformers_count(kind):
    """Built on the meta device: 109,514,298 weights of BERT-base, its decoder not counted twice."""
    settings = {"model_type": kind}
    if kind == "roberta":
        settings |= dict(max_position_embeddings=514, type_vocab_size=1)
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        theirs = CLASSES[kind](config)
        model = loading.build(settings, Path("here"), "fill", [], -1)
    assert model.size() == theirs.num_parameters()
    assert model.head.architecture == CLASSES[kind].__name__ == fill.architecture(family_named(kind))


@families
def test_a_larger_vocabulary(kind, tmp_path):
    """As where an adapter brings new tokens: old rows say what they said, as after transformers' resizing."""
    theirs = masked_model(kind, tmp_path)
    model = load(tmp_path)
    model.resize(120)
    theirs.resize_token_embeddings(120)
    ours = everywhere(model)
    assert ours.shape[1] == model.last.out_features == len(model.last.bias) == 120
    assert torch.allclose(ours[:, :99], peer_everywhere(theirs)[:, :99], atol=1e-5)
    assert not ours[:, 99:].any()


def test_words_within_and_at_the_beginning_are_told_apart(tmp_path):
    """RoBERTa has a token for each: both are told, with the space that makes the difference."""
    masked_model("roberta", tmp_path, vocab_size=400)
    WRITE_TOKENIZER["roberta"](tmp_path)
    model, tokenizer = minift.load(tmp_path, task="fill")
    within = tokenizer.id("a")
    beginning = tokenizer.encode([" a"], special=False)[0].ids[0]
    with torch.no_grad():
        model.last.bias[within] = 60
        model.last.bias[beginning] = 50
    (row,) = minift.predict(model, tokenizer, ["the<mask>film"])
    (mask,) = row["masks"]
    assert list(mask)[:2] == ["a", " a"] and mask["a"] + mask[" a"] > 0.99 and row["text"] == "theafilm"


# adapters and four bits


def test_four_bits_are_transformers_bitsandbytes(exact_bitsandbytes, tmp_path):
    """The body in four bits, the head as it was: packed by either, from a folder of either."""
    masked_model("bert", tmp_path / "base", hidden_size=64, intermediate_size=64)
    model = load(tmp_path / "base", base="nf4")
    quantized = nf4(bnb_4bit_use_double_quant=True)
    quantized.llm_int8_skip_modules = ["cls"]
    theirs = CLASSES["bert"].from_pretrained(tmp_path / "base", quantization_config=quantized).eval()
    assert torch.allclose(everywhere(model), peer_everywhere(theirs), atol=2e-5)
    minift.save(model, None, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = CLASSES["bert"].from_pretrained(tmp_path / "ours").eval()
    assert torch.allclose(everywhere(model), peer_everywhere(again), atol=2e-5)
    assert torch.allclose(everywhere(load(tmp_path / "theirs")), peer_everywhere(theirs), atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "head", "bias", "norm", "last-1"])
def test_methods(method, tmp_path):
    """Each trains something, of the head too where it says so; the embedding, which is the decoder too, stays."""
    masked_model("bert", tmp_path)
    model = load(tmp_path)
    minift.adapt(model, method)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and "body.embeddings.word.weight" not in trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    job = minift.prepare(model, lr=1e-2)
    asked = sequence(0, IDS[1], rows=[1, 5, 8], targets=[3, 4, 5])
    loss, _ = fill.loss(model, pack([asked]), Noise())
    loss.backward()
    job.optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= trained
    assert ("head.dense.weight" in moved) == (method != "lora")
