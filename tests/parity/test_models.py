"""Our BERT and GPT-2 beside transformers', random models at odd sizes: logits, loss, gradients; packed and alone.

python -m pytest tests/parity/test_models.py
"""

import numpy as np
import pytest
import torch
import transformers
from helpers import peer, random_ids, sequence
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import minift
from minift.checkpoints import loading, weights
from minift.data.batch import pack
from minift.ops.dropout import Noise
from minift.ops.loss import linear_cross_entropy
from minift.tasks import classify

LENGTHS = [1, 40, 7, 3, 13, 2]  # one token, the maximum, and between, in one pack

BERTS = {
    "base": {},
    "one layer": dict(num_hidden_layers=1),
    "head size 7": dict(hidden_size=21, num_attention_heads=3),
    "one head": dict(num_attention_heads=1),
    "tanh gelu": dict(hidden_act="gelu_new"),
    "relu": dict(hidden_act="relu"),
    "large epsilon": dict(layer_norm_eps=1e-3),
    "one type": dict(type_vocab_size=1),
}
GPTS = {
    "base": {},
    "one layer": dict(n_layer=1),
    "head size 7": dict(n_embd=21, n_head=3),
    "erf gelu": dict(activation_function="gelu"),
    "inner width": dict(n_inner=50),
    "inverse layer index": dict(scale_attn_by_inverse_layer_idx=True, n_layer=3),
    "no scale": dict(scale_attn_weights=False),
    "untied": dict(tie_word_embeddings=False),
    "large epsilon": dict(layer_norm_epsilon=1e-3),
    "upcast": dict(reorder_and_upcast_attn=True),
}


def padded(ids: list[list[int]], types: list[list[int]] | None = None) -> dict:
    """A padded batch as the peer wants it."""
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([x + [0] * (longest - len(x)) for x in ids]),
        "attention_mask": torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x in ids]),
    }
    if types:
        batch["token_type_ids"] = torch.tensor([x + [0] * (longest - len(x)) for x in types])
    return batch


def check_gradients(model, theirs):
    """Every parameter's gradient within 1e-5 of the peer's, relative to its largest (0.01 where it has none)."""
    peers = dict(theirs.named_parameters())
    for name, hub_name in weights.hub_names(model).items():
        ours, want = model.get_parameter(name).grad, peers[hub_name].grad
        want = want.t() if model.family.TRANSPOSED and hub_name.endswith(model.family.TRANSPOSED) else want
        assert (ours - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1e-2), name


def check_classifier(model, batch, theirs, theirs_batch: dict):
    """Logits, loss, number of hits and gradients are the peer's."""
    labels = theirs_batch["labels"]
    want = theirs(**theirs_batch)
    with torch.no_grad():
        assert (model.logits(batch) - want.logits).abs().max() <= 1e-5
    loss, correct = classify.loss(model, batch, Noise())
    assert loss.item() / len(labels) == pytest.approx(want.loss.item(), abs=1e-6)
    assert correct == (want.logits.argmax(-1) == labels).sum()
    want.loss.backward()
    (loss / len(labels)).backward()
    check_gradients(model, theirs)


@pytest.mark.parametrize("changes", BERTS.values(), ids=BERTS.keys())
def test_bert_classification(changes, tmp_path):
    theirs = peer(BertForSequenceClassification, tmp_path, num_labels=3, **changes)
    model, _ = minift.load(tmp_path, task="classify")
    ids = random_ids(LENGTHS)
    types = [(np.arange(len(x)) % theirs.config.type_vocab_size).tolist() for x in ids]
    labels = [i % 3 for i in range(len(ids))]
    every = enumerate(zip(ids, labels, types, strict=True))
    batch = pack([sequence(i, x, rows=[0], targets=[y], types=t) for i, (x, y, t) in every])
    check_classifier(model, batch, theirs, padded(ids, types) | {"labels": torch.tensor(labels)})


@pytest.mark.parametrize("changes", GPTS.values(), ids=GPTS.keys())
def test_gpt2_language_model(changes, tmp_path):
    """The loss asks about every token but a sequence's last; the sequence of one token is asked nothing."""
    attention = {"attn_implementation": "eager"} if "reorder_and_upcast_attn" in changes else {}
    theirs = peer(GPT2LMHeadModel, tmp_path, **changes, **attention)
    model, _ = minift.load(tmp_path, task="complete")
    ids = random_ids(LENGTHS)

    want = theirs(**padded(ids)).logits
    with torch.no_grad():
        everywhere = model.logits(pack([sequence(i, x) for i, x in enumerate(ids)]))
    assert (everywhere - torch.cat([want[i, : len(x)] for i, x in enumerate(ids)])).abs().max() <= 1e-5

    batch = pack([sequence(i, x, rows=range(len(x) - 1), targets=x[1:]) for i, x in enumerate(ids)])
    loss, _ = linear_cross_entropy(model(batch), model.head.out.weight, None, batch.targets)
    labels = padded(ids)["input_ids"].masked_fill(padded(ids)["attention_mask"] == 0, -100)
    expected = theirs(**padded(ids), labels=labels).loss
    assert loss.item() / batch.n_targets == pytest.approx(expected.item(), abs=1e-6)
    expected.backward()
    (loss / batch.n_targets).backward()
    check_gradients(model, theirs)


@pytest.mark.parametrize("changes", [{}, dict(n_embd=21, n_head=3, n_layer=1)], ids=["base", "head size 7, one layer"])
def test_gpt2_classification(changes, tmp_path):
    theirs = peer(transformers.GPT2ForSequenceClassification, tmp_path, num_labels=3, pad_token_id=0, **changes)
    model, _ = minift.load(tmp_path, task="classify")
    ids = random_ids(LENGTHS)
    labels = [i % 3 for i in range(len(ids))]
    every = enumerate(zip(ids, labels, strict=True))
    batch = pack([sequence(i, x, rows=[len(x) - 1], targets=[y]) for i, (x, y) in every])
    check_classifier(model, batch, theirs, padded(ids) | {"labels": torch.tensor(labels)})


@pytest.mark.parametrize("cls", [BertModel, transformers.GPT2Model])
def test_bodies_without_a_head(cls, tmp_path):
    theirs = peer(cls, tmp_path)
    model, _ = minift.load(tmp_path)
    ids = random_ids(LENGTHS)
    want = theirs(**padded(ids)).last_hidden_state
    with torch.no_grad():
        ours = model(pack([sequence(i, x) for i, x in enumerate(ids)]))
    assert (ours - torch.cat([want[i, : len(x)] for i, x in enumerate(ids)])).abs().max() <= 1e-5


@pytest.mark.parametrize("cls, task", [(BertForSequenceClassification, "classify"), (GPT2LMHeadModel, "complete")])
def test_packed_equals_one_by_one(cls, task, tmp_path):
    """With dropout on: neither the other sequences of a pack nor their order change a sequence's hidden states."""
    peer(cls, tmp_path)
    model, _ = minift.load(tmp_path, task=task, dropout=0.3)
    sequences = [sequence(i, x, rows=sorted({0, len(x) - 1})) for i, x in enumerate(random_ids(LENGTHS))]

    def hidden(part):
        batch = pack(part)
        with torch.no_grad():
            h = model(batch, Noise(7, 3, batch.keys))
        return dict(zip([s.number for s in part], h.split([len(s.rows) for s in part]), strict=True))

    together, backwards = hidden(sequences), hidden(sequences[::-1])
    for s in sequences:
        alone = hidden([s])[s.number]
        assert torch.allclose(together[s.number], alone, atol=1e-5)
        assert torch.allclose(backwards[s.number], alone, atol=1e-5)


@pytest.mark.parametrize("cls, task", [(BertForSequenceClassification, "classify"), (GPT2LMHeadModel, "complete")])
def test_rows_are_a_selection(cls, task, tmp_path):
    """Asking about some tokens gives what asking about all gives there, dropout on: idea 1 is exact."""
    peer(cls, tmp_path)
    model, _ = minift.load(tmp_path, task=task, dropout=0.3)
    ids = random_ids(LENGTHS)
    whole = pack([sequence(i, x) for i, x in enumerate(ids)])
    some = pack([sequence(i, x, rows=range(0, len(x), 3)) for i, x in enumerate(ids)])
    with torch.no_grad():
        everywhere, there = model(whole, Noise(1, 2, whole.keys)), model(some, Noise(1, 2, some.keys))
    assert torch.allclose(everywhere[some.rows], there, atol=1e-5)


@pytest.mark.slow
def test_a_pretrained_size_has_the_known_counts():
    """Built on the meta device: BERT-base with two labels, GPT-2 with a tied head."""
    for config, task, count in (
        (transformers.BertConfig(), "classify", 109_483_778),
        (transformers.GPT2Config(), "complete", 124_439_808),
    ):
        settings = config.to_dict() | {"model_type": config.model_type}
        model = loading.build(settings, "here", task, ["no", "yes"], -1)
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.slow
@pytest.mark.parametrize("cls, task", [(BertForSequenceClassification, "classify"), (GPT2LMHeadModel, "complete")])
def test_dropout_spreads_hidden_states_as_the_peers_does(cls, task, tmp_path):
    """1,200 draws each: other masks, but the same mean (within chance) and the same spread of the states."""
    theirs = peer(cls, tmp_path, scale=0.1).train()
    model, _ = minift.load(tmp_path, task=task)
    batch = pack([sequence(i, x, rows=[0, len(x) - 1]) for i, x in enumerate(random_ids([40, 25, 33]))])
    body = theirs.bert if task == "classify" else theirs.transformer
    n = 1200
    torch.manual_seed(1)
    with torch.no_grad():
        ours = torch.stack([model(batch, Noise(42, step, batch.keys)) for step in range(n)])
        ids = padded([x.tolist() for x in batch.ids.split(batch.offsets.diff().tolist())])
        found = [body(**ids).last_hidden_state for _ in range(n)]
    ends = [(i, at) for i, length in enumerate((40, 25, 33)) for at in (0, length - 1)]
    peers = torch.stack([torch.stack([h[i, at] for i, at in ends]) for h in found])
    assert ours.std(0).mean().item() == pytest.approx(peers.std(0).mean().item(), rel=0.02)  # chance: 0.5 % (LOG.md)
    chance = (ours.var(0) / n + peers.var(0) / n).mean()
    assert 0.6 < ((ours.mean(0) - peers.mean(0)) ** 2).mean() / chance < 1.6
