"""Training beside the Hugging Face Trainer: the same data, order, head and seed give the same losses and weights.

MINIFT_ASSETS=../shared python -m pytest tests/parity/test_trainer.py
"""

import pytest
import torch
import transformers
from folders import write
from helpers import losses, metrics, train, trainer_log
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

import minift

pytestmark = pytest.mark.slow
NO_DROPOUT = {
    "bert": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
}


@pytest.fixture(scope="module")
def rows(assets):
    lines = (assets / "data/sst2-sentences/train.tsv").read_text(encoding="utf-8").splitlines()[:100]
    return [(text, int(label)) for text, label in (line.split("\t") for line in lines)]


@pytest.fixture
def data(rows, tmp_path):
    """The same rows as a file for us."""
    return write(tmp_path / "train.jsonl", *({"text": text, "label": label} for text, label in rows))


def gpt2(folder, assets):
    """No pretrained GPT-2 is at hand: a random one with the real tokenizer."""
    transformers.set_seed(1)
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, pad_token_id=50256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(assets / "weights/tokenizers/gpt2").save_pretrained(folder)
    return folder


def pair(folder, family):
    """(our model, our tokenizer, the peer's model), with fresh heads drawn from one seed and without dropout."""
    transformers.set_seed(42)
    off = NO_DROPOUT[family]
    peer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32, **off)
    return *minift.load(folder, task="classify", labels=["0", "1"], dropout=0.0, seed=42), peer


def peer_log(peer, folder, rows, out, trainer=Trainer, **options) -> list[dict]:
    """What the Trainer logs on the rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    encoded = [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in rows]
    return trainer_log(peer, encoded, DataCollatorWithPadding(tokenizer), out, trainer, **options)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_twenty_steps_follow_the_trainer(family, assets, minilm, rows, data, tmp_path):
    """Full fine-tuning with dropout 0, clipping, warm-up and decay on; 100 examples, so the order of two epochs too."""
    folder = minilm if family == "bert" else gpt2(tmp_path / "gpt2", assets)
    model, tokenizer, peer = pair(folder, family)
    out = peer.classifier if family == "bert" else peer.score
    assert torch.equal(model.head.out.weight, out.weight)  # the fresh head is the peer's, bit for bit

    options = dict(warmup_steps=3, weight_decay=0.01, max_grad_norm=1.0)
    expected = peer_log(peer, folder, rows, tmp_path / "peer", **options)

    options = dict(steps=20, batch=8, max_length=64, seed=42, warmup=3, weight_decay=0.01, labels="0,1")
    train(model, tokenizer, data, tmp_path / "run", model=str(folder), **options)
    found = metrics(tmp_path / "run")

    assert len(found) == len(expected) == 20
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["train/learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9, abs=1e-12)
        assert ours["train/grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert torch.allclose(model.head.out.weight, out.weight, atol=1e-5)


class Mended(Trainer):
    """The Trainer without its flaw in classification: it neither divides by the number of accumulated batches nor by
    their targets (transformers issue 47688)."""

    loss_is_scaled_for_ga = False


def test_accumulation_where_the_trainer_is_wrong(minilm, rows, data, tmp_path):
    """Four micro-batches of two: ours is the step of eight; the Trainer's loss is four times that, unless mended."""
    model, tokenizer, _ = pair(minilm, "bert")
    train(model, tokenizer, data, tmp_path / "run", steps=20, max_length=64, tokens=70)
    ours = losses(tmp_path / "run")

    def theirs(trainer, steps):
        _, _, peer = pair(minilm, "bert")
        options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=steps)
        return [entry["loss"] for entry in peer_log(peer, minilm, rows, tmp_path / "peer", trainer, **options)]

    assert theirs(Mended, 20) == pytest.approx(ours, abs=1e-5)
    assert theirs(Trainer, 1) == pytest.approx([4 * ours[0]], rel=1e-4)
