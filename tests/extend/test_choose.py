"""A fork's task, complete in one file (choose.py): multiple choice, beside transformers, trained through the command.

python -m pytest tests/extend/test_choose.py
"""

import json

import pytest
import transformers
from forks import fork, in_fork
from helpers import peer, small_bert

ROWS = [
    {"text": "the film is", "choices": ["good and fine", "bad", "dull plot it"], "label": 0},
    {"text": "a bad plot", "choices": ["great", "poor and so dull"], "label": 1},
    {"text": "the music was quite", "choices": ["bad in it", "not good", "fine", "so so"], "label": 2},
]

COMPARE = """
import json, sys, numpy as np, torch, transformers, minift
from minift.data.batch import pack
from minift.tasks import choose
folder, rows = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = minift.load(folder, task="choose")
sequences = choose.encode(choose.from_rows(rows), model, tokenizer, 40)
# in float64: the endings of an example pull what they share opposite ways, and of what is left float32 has five digits
theirs = transformers.BertForMultipleChoice.from_pretrained(folder).double().eval()
wanted = []
for row in rows:  # one at a time: transformers wants equal numbers of endings in a batch
    pieces = tokenizer.encode([row["text"]] * len(row["choices"]), row["choices"], 40)
    longest = max(len(p.ids) for p in pieces)
    grid = {
        "input_ids": [p.ids + [0] * (longest - len(p.ids)) for p in pieces],
        "token_type_ids": [p.types + [0] * (longest - len(p.ids)) for p in pieces],
        "attention_mask": [[1] * len(p.ids) + [0] * (longest - len(p.ids)) for p in pieces],
    }
    grid = {name: torch.tensor([value]) for name, value in grid.items()}
    wanted.append(theirs(**grid, labels=torch.tensor([row["label"]])))
loss, right = choose.loss(model, pack(sequences), choose.SILENT)
loss.backward()
sum(w.loss for w in wanted).backward()
scores, _ = choose.scores_of(model, pack(sequences))
for found, want in zip(scores, wanted, strict=True):
    np.testing.assert_allclose(found[: want.logits.shape[1]].detach(), want.logits[0].detach(), atol=1e-5)
np.testing.assert_allclose(loss.item(), sum(w.loss.item() for w in wanted), rtol=1e-5)
peers = dict(theirs.named_parameters())
for name, p in model.named_parameters():
    want = peers[model.hub_name(name)].grad
    assert (p.grad - want).abs().max() <= 2e-5 * want.abs().max().clamp(min=1e-2), name
apart = [choose.loss(model, pack([s]), choose.SILENT)[0] for s in sequences]
np.testing.assert_allclose(sum(apart).item(), loss.item(), rtol=1e-5)
noises = [choose.Noise(1, 2, pack(some).keys) for some in ([sequences[0]], sequences)]
alone = choose.scores_of(model, pack(sequences[:1]), noises[0])[0][0]
together = choose.scores_of(model, pack(sequences), noises[1])[0][0, :3]
np.testing.assert_allclose(alone.detach(), together.detach(), atol=1e-5)
print("equal")
"""


TRAIN = """
import json, sys, numpy as np, torch, transformers
from pathlib import Path
from helpers import fails, works
model, rows, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])

rng = np.random.default_rng(0)
many = []
for _ in range(80):
    endings = ["so good and fine"] + ["bad"] * int(rng.integers(1, 4))
    rng.shuffle(endings)
    many.append({"text": "the film was", "choices": endings, "label": endings.index("so good and fine")})
data = folder / "choices.jsonl"
data.write_text("".join(json.dumps(row) + "\\n" for row in many))
for method in ("full", "lora"):
    places = dict(model=model, run=folder / method, data=data)
    options = f"--method {method} --valid 0.2 --epochs 4 --batch 4 --lr 5e-3 --tokens 200"
    works("train --model {model} --task choose --data {data} --out {run} " + options, **places)
    told = works("eval --model {run} --task choose --data {data} --json", **places)
    assert told.last["accuracy"] > 0.95, told.last
    found = works("predict --model {run} --task choose --data {data}", **places).rows
    assert sum(f["label"] == row["label"] for f, row in zip(found, many, strict=True)) > 76
    assert all(len(f["scores"]) == len(row["choices"]) for f, row in zip(found, many, strict=True))
    header = (folder / method / "results.csv").read_text().splitlines()[0]
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
loaded, info = transformers.BertForMultipleChoice.from_pretrained(folder / "full/best", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info

# faults are told by line
faulty = [rows[0], {"text": "a", "choices": ["b"], "label": 0}, {"text": "a", "choices": ["b", "c"], "label": 2}]
data.write_text("".join(json.dumps(row) + "\\n" for row in faulty))
words = ("choices.jsonl:2: choices is ['b']; expected two or more texts", "choices.jsonl:3: label is 2; expected 0 to 1")
fails("train --model {model} --task choose --data {data} --out {run}", *words, model=model, data=data, run=folder / "no")
assert not (folder / "no").exists()
print("trained")
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """minift with one file and one line more."""
    return fork(
        tmp_path_factory.mktemp("fork"),
        {"choose.py": "minift/tasks/choose.py"},
        {"TASKS = {": '    "choose": "which of several endings goes on from a text",'},
    )


@pytest.mark.slow
def test_scores_loss_gradients_and_dropout_beside_transformers(forked, tmp_path):
    """Several endings an example, of different numbers, in one pack and alone; dropout does not depend on the pack."""
    small_bert(tmp_path)
    peer(transformers.BertForMultipleChoice, tmp_path, scale=0.1, vocab_size=64, hidden_size=32, intermediate_size=64)
    assert in_fork(forked, COMPARE, tmp_path, json.dumps(ROWS)) == "equal\n"


@pytest.mark.slow
def test_it_is_trained_evaluated_and_predicts_and_tells_faults_by_line(forked, tmp_path):
    small_bert(tmp_path / "model")
    assert in_fork(forked, TRAIN, tmp_path / "model", json.dumps(ROWS), tmp_path) == "trained\n"
