"""A fork's task, complete in one file (choose.py): multiple choice, beside transformers, trained through the command.

python -m pytest tests/extend/test_choose.py
"""

import json

import numpy as np
import pytest
import torch
import transformers
from forks import check_gradients, commands, fork, in_fork, one_step
from helpers import peer, small_bert

from minift.data.tokenizer import BERT, read_tokenizer

FORECASTS = True  # conftest.py

ROWS = [
    {"text": "the film is", "choices": ["good and fine", "bad", "dull plot it"], "label": 0},
    {"text": "a bad plot", "choices": ["great", "poor and so dull"], "label": 1},
    {"text": "the music was quite", "choices": ["bad in it", "not good", "fine", "so so"], "label": 2},
]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """minift with one file and one line more."""
    return fork(
        tmp_path_factory.mktemp("fork"),
        {"choose.py": "minift/tasks/choose.py"},
        {"TASKS = {": '    "choose": "which of several endings goes on from a text",'},
    )


def jsonl(path, rows: list[dict]):
    """A file with one of these objects a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def padded(tokenizer, row: dict) -> dict[str, torch.Tensor]:
    """An example as transformers takes it: (1, K, T), its K endings padded to the longest."""
    pieces = tokenizer.encode([row["text"]] * len(row["choices"]), row["choices"])
    longest = max(len(piece.ids) for piece in pieces)
    grid = {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    for piece in pieces:
        padding = [0] * (longest - len(piece.ids))
        grid["input_ids"].append(piece.ids + padding)
        grid["token_type_ids"].append(piece.types + padding)
        grid["attention_mask"].append([1] * len(piece.ids) + padding)
    return {name: torch.tensor([value]) for name, value in grid.items()}


@pytest.mark.slow
def test_scores_loss_and_gradients_equal_transformers(forked, tmp_path):
    """Several endings an example, of different numbers, in one pack.

    The endings of an example pull what they share in opposite directions, and little of its gradient is left: float32
    has five digits of it, transformers too, so that they are compared in float64.
    """
    small_bert(tmp_path)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64)
    theirs = peer(transformers.BertForMultipleChoice, tmp_path, scale=0.1, **sizes).double()
    tokenizer = read_tokenizer(tmp_path, BERT)
    outputs = []
    for row in ROWS:  # one at a time: a batch has to have as many endings in each
        outputs.append(theirs(**padded(tokenizer, row), labels=torch.tensor([row["label"]])))
    want = sum(output.loss for output in outputs)
    want.backward()

    found = one_step(forked, tmp_path, "choose", ROWS)
    scores = torch.cat([output.logits[0] for output in outputs]).detach()
    np.testing.assert_allclose(found["logits"][:, 0], scores, atol=1e-5)
    np.testing.assert_allclose(found["loss"], want.detach(), rtol=1e-5)
    check_gradients(found["gradients"], theirs, tolerance=2e-5)


PACKS = """
import json, sys, torch, minift
from minift.data.batch import pack
from minift.tasks import choose
model, tokenizer = minift.load(sys.argv[1], task="choose")
sequences = choose.encode(choose.from_rows(json.loads(sys.argv[2])), model, tokenizer, 40)

def told(sequences):
    batch = pack(sequences)
    noise = choose.Noise(1, 2, batch.keys)
    return choose.loss(model, batch, noise)[0], choose.scores_of(model, batch, noise)[0]

(loss, scores), apart = told(sequences), [told([sequence]) for sequence in sequences]
torch.testing.assert_close(sum(alone for alone, _ in apart), loss, atol=0, rtol=1e-5)
for row, (_, alone) in zip(scores, apart, strict=True):
    torch.testing.assert_close(row[: alone.shape[1]], alone[0], atol=1e-5, rtol=0)
print("equal")
"""


@pytest.mark.slow
def test_loss_and_dropout_are_the_same_in_any_pack(forked, tmp_path):
    small_bert(tmp_path)
    assert in_fork(forked, PACKS, tmp_path, json.dumps(ROWS)) == "equal\n"


@pytest.mark.slow
def test_it_is_trained_evaluated_and_predicts(forked, tmp_path):
    small_bert(tmp_path / "model")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(80):
        endings = ["so good and fine"] + ["bad"] * int(rng.integers(1, 4))
        rng.shuffle(endings)
        rows.append({"text": "the film was", "choices": endings, "label": endings.index("so good and fine")})
    jsonl(tmp_path / "choices.jsonl", rows)
    lines = []
    for method in ("full", "lora"):
        task = f" {{t}}/{method} --task choose --data {{t}}/choices.jsonl "
        options = f"--method {method} --valid 0.2 --epochs 4 --batch 4 --lr 5e-3 --tokens 200"
        lines.append("train --model {t}/model --out" + task + options)
        lines.append("eval --json --model" + task)
        lines.append("predict --model" + task)
    said = commands(forked, *lines, t=tmp_path)
    for method, told, predicted in (("full", said[1], said[2]), ("lora", said[4], said[5])):
        assert told.last["accuracy"] > 0.95
        assert sum(found["label"] == row["label"] for found, row in zip(predicted.rows, rows, strict=True)) > 76
        for found, row in zip(predicted.rows, rows, strict=True):
            assert len(found["scores"]) == len(row["choices"])
        header = (tmp_path / method / "results.csv").read_text().splitlines()[0]
        assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    load = transformers.BertForMultipleChoice.from_pretrained
    _, info = load(tmp_path / "full/best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info


@pytest.mark.slow
def test_faults_are_told_by_line(forked, tmp_path):
    small_bert(tmp_path / "model")
    rows = [ROWS[0], {"text": "a", "choices": ["b"], "label": 0}, {"text": "a", "choices": ["b", "c"], "label": 2}]
    jsonl(tmp_path / "c.jsonl", rows)
    line = "train --model {t}/model --task choose --data {t}/c.jsonl --out {t}/run"
    (said,) = commands(forked, line, code=1, t=tmp_path)
    assert "c.jsonl:2: choices is ['b']; expected two or more texts" in said.err
    assert "c.jsonl:3: label is 2; expected 0 to 1" in said.err
    assert not (tmp_path / "run").exists()
