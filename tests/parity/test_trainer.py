"""Training beside the Hugging Face Trainer: the same data, order, head and seed give the same losses and weights.

MINIFT_ASSETS=../shared python -m pytest tests/parity/test_trainer.py
"""

import json

import pytest
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import minift

BATCH, STEPS = 8, 20


def peer_losses(model, tokenizer, rows, out, batch=BATCH, trainer_class=Trainer, **options) -> list[dict]:
    """What the Trainer logs of each of the first STEPS steps."""
    encoded = [{**tokenizer(text, truncation=True, max_length=64), "labels": label} for text, label in rows]
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        learning_rate=5e-5,
        seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=encoded, data_collator=DataCollatorWithPadding(tokenizer)
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def rows(assets):
    lines = (assets / "data/sst2-sentences/train.tsv").read_text(encoding="utf-8").splitlines()[:100]
    return [(text, int(label)) for text, label in (line.split("\t") for line in lines)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_twenty_steps_follow_the_trainer(family, assets, minilm, rows, tmp_path):
    """Full fine-tuning with dropout 0, clipping, warm-up and decay on; 100 examples, so the order of two epochs too."""
    if family == "bert":
        folder = minilm
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    else:  # no pretrained GPT-2 is at hand: a random one with the real tokenizer
        folder = tmp_path / "gpt2"
        off = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
        transformers.set_seed(1)
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, pad_token_id=50256)
        ).save_pretrained(folder)
        AutoTokenizer.from_pretrained(assets / "weights/tokenizers/gpt2").save_pretrained(folder)
    transformers.set_seed(42)
    peer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32, **off)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or "<|endoftext|>"
    model, tok = minift.load(folder, task="classify", labels=["0", "1"], dropout=0.0, seed=42)
    out = peer.classifier if family == "bert" else peer.score
    assert torch.equal(model.head.out.weight, out.weight)  # the fresh head is the peer's, bit for bit

    expected = peer_losses(
        peer, tokenizer, rows, tmp_path / "peer", warmup_steps=3, weight_decay=0.01, max_grad_norm=1.0
    )

    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    minift.train(
        model,
        tok,
        minift.TrainConfig(
            model=str(folder),
            data=str(data),
            out=str(tmp_path / "run"),
            steps=STEPS,
            batch=BATCH,
            max_length=64,
            seed=42,
            warmup=3,
            weight_decay=0.01,
            labels="0,1",
        ),
    )
    found = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]

    assert len(found) == len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["train/learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9, abs=1e-12)
        assert ours["train/grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    ours = dict(model.head.named_parameters())["out.weight"]
    assert torch.allclose(ours, out.weight, atol=1e-5)


class Mended(Trainer):
    """The Trainer without its flaw in classification: it neither divides by the number of accumulated batches nor by
    their targets (transformers issue 47688)."""

    loss_is_scaled_for_ga = False


@pytest.mark.slow
def test_accumulation_where_the_trainer_is_wrong(minilm, rows, tmp_path):
    """Four micro-batches of two: ours is the step of eight; the Trainer's loss is four times that, unless mended."""
    off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    model, tok = minift.load(minilm, task="classify", labels=["0", "1"], dropout=0.0, seed=42)
    out = tmp_path / "run"
    minift.train(model, tok, minift.TrainConfig(data=str(data), out=str(out), steps=STEPS, max_length=64, tokens=70))
    ours = [json.loads(line)["train/loss"] for line in open(out / "metrics.jsonl")]

    def losses(cls):
        transformers.set_seed(42)
        peer = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2, dtype=torch.float32, **off)
        tokenizer = AutoTokenizer.from_pretrained(minilm)
        logs = peer_losses(peer, tokenizer, rows, tmp_path / "peer", 2, cls, gradient_accumulation_steps=4)
        return [entry["loss"] for entry in logs]

    assert losses(Mended) == pytest.approx(ours, abs=1e-5)
    assert losses(Trainer)[0] == pytest.approx(4 * ours[0], rel=1e-4)
