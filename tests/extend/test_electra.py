"""A fork's family, complete in one file (electra.py): ELECTRA, beside transformers, trained through the command.

python -m pytest tests/extend/test_electra.py
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from folders import write
from forks import check_gradients, commands, fork, one_step
from helpers import VOCABULARY, reviews

from minift.data.tokenizer import BERT, read_tokenizer

FORECASTS = True  # conftest.py

peft = pytest.importorskip("peft")
SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=40,
)  # fmt: skip
ROWS = [
    {"text": "the film is good", "label": "1"},
    {"text": "a bad plot , and so dull", "pair": "it was poor", "label": "0"},
    {"text": "fine", "label": "2"},
]


def small_electra(
    folder: Path, embedding_size: int, scale: float = 0.2
) -> transformers.ElectraForSequenceClassification:
    """A random classifier of three labels, saved in `folder` with a vocabulary of a few words."""
    torch.manual_seed(0)
    labels = {i: str(i) for i in range(3)}
    config = transformers.ElectraConfig(**SIZES, embedding_size=embedding_size, id2label=labels)
    model = transformers.ElectraForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float(name.endswith("LayerNorm.weight")), scale)
    model.save_pretrained(folder)
    write(folder / "vocab.txt", *VOCABULARY, *"bcdefghijklmnopqrstuvwxyz,")
    return model


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """minift with one file and one line more."""
    folder = tmp_path_factory.mktemp("fork")
    return fork(folder, {"electra.py": "minift/models/electra.py"}, {"FAMILIES = {": '    "electra": "ELECTRA",'})


@pytest.mark.slow
@pytest.mark.parametrize("embedding_size", [12, 32])
def test_logits_loss_and_gradients_equal_transformers(embedding_size, forked, tmp_path):
    """12: with the projection, and of a width that the four heads divide as little as they have to; 32: without."""
    theirs = small_electra(tmp_path, embedding_size)
    tokens = read_tokenizer(tmp_path, BERT).encode([r["text"] for r in ROWS], [r.get("pair") for r in ROWS])
    outputs = []
    for row, t in zip(ROWS, tokens, strict=True):  # one at a time, without padding
        inputs = {"input_ids": torch.tensor([t.ids]), "token_type_ids": torch.tensor([t.types])}
        outputs.append(theirs(**inputs, labels=torch.tensor([int(row["label"])])))
    want = sum(output.loss for output in outputs)
    want.backward()

    found = one_step(forked, tmp_path, "classify", ROWS)
    logits = torch.cat([output.logits for output in outputs]).detach()
    torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["loss"], want.detach(), atol=0, rtol=1e-5)
    check_gradients(found["gradients"], theirs)


@pytest.mark.slow
def test_it_is_trained_and_saved_for_transformers_and_peft(forked, tmp_path):
    """In full and then, for classes of other names, by LoRA: what the hub has in `classifier` is trained as one."""
    small_electra(tmp_path / "model", 16, scale=0.1)
    train, valid = reviews(tmp_path / "train.tsv", 128), reviews(tmp_path / "valid.tsv", 32, seed=1)
    for path in (train, valid):
        path.with_stem("other-" + path.stem).write_text(path.read_text().replace("praise", "a").replace("blame", "b"))
    said = commands(
        forked,
        "train --model {t}/model --task classify --data {t}/train.tsv --epochs 8 --batch 8 --lr 3e-3 "
        "--dropout 0 --out {t}/full",
        "eval --data {t}/valid.tsv --json --model {t}/full",
        "predict --data {t}/valid.tsv --model {t}/full",
        "train --model {t}/full/last --task classify --data {t}/other-train.tsv --epochs 3 --batch 8 --lr 3e-3 "
        "--method lora --out {t}/lora",
        "eval --data {t}/other-valid.tsv --json --model {t}/lora",
        "predict --data {t}/other-valid.tsv --model {t}/lora",
        t=tmp_path,
    )
    assert said[1].last["accuracy"] > 0.9 and said[4].last["accuracy"] > 0.9, said

    load = transformers.ElectraForSequenceClassification.from_pretrained
    full = load(tmp_path / "full/last").eval()
    base = load(tmp_path / "full/last")
    lora = peft.PeftModel.from_pretrained(base, tmp_path / "lora/last").eval()
    texts = [line.split("\t")[0] for line in (tmp_path / "valid.tsv").read_text().splitlines()[:5]]
    settings = json.loads((tmp_path / "lora/last/adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["classifier"]  # which PEFT trains as one
    for model, predicted in ((full, said[2]), (lora, said[5])):
        for tokens, row in zip(read_tokenizer(tmp_path / "model", BERT).encode(texts), predicted.rows[:5], strict=True):
            with torch.no_grad():
                p = model(input_ids=torch.tensor([tokens.ids])).logits.softmax(-1)[0]
            torch.testing.assert_close(p, torch.tensor([*row["scores"].values()]), atol=1e-5, rtol=0)
