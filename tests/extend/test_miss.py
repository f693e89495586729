"""A fork's adapter, complete in one file (miss.py): MiSS, beside PEFT, whose files it reads and writes.

python -m pytest tests/extend/test_miss.py
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from forks import commands, fork, in_fork, one_step
from helpers import peer, reviews, small_bert

from minift.data.tokenizer import BERT, read_tokenizer

FORECASTS = True  # conftest.py

peft = pytest.importorskip("peft")
NAMES = {0: "blame", 1: "praise"}
ROWS = [{"text": "a good film", "label": "praise"}, {"text": "the plot was so dull and bad", "label": "blame"}]


def classifier(folder: Path) -> transformers.BertForSequenceClassification:
    """A random BERT of two classes, saved in `folder` with a vocabulary of a few words."""
    small_bert(folder)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64)
    return peer(transformers.BertForSequenceClassification, folder, scale=0.1, id2label=NAMES, **sizes)


def inputs(folder: Path, text: str) -> dict[str, torch.Tensor]:
    """A text as transformers' models take it."""
    (tokens,) = read_tokenizer(folder, BERT).encode([text])
    return {"input_ids": torch.tensor([tokens.ids])}


def scores(model, folder: Path, texts: list[str]) -> torch.Tensor:
    """The probabilities that a model of transformers gives to each text, (S, 2)."""
    with torch.no_grad():
        return torch.cat([model(**inputs(folder, text)).logits.softmax(-1) for text in texts])


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """minift with one file and one line more."""
    line = '    "miss": Method("miss", "one small block for all parts of a row of the weight (MiSS)"),'
    return fork(tmp_path_factory.mktemp("fork"), {"miss.py": "minift/adapters/miss.py"}, {"METHODS = {": line})


@pytest.mark.slow
@pytest.mark.parametrize("rank", [5, 8])
def test_logits_loss_and_gradients_equal_pefts(rank, forked, tmp_path):
    """An adapter folder that PEFT wrote; 5 does not divide the layers' 32 and 64 inputs."""
    base = classifier(tmp_path / "base")
    config = peft.MissConfig(r=rank, target_modules=["query", "output.dense"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "miss_block" in name:
                p.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))

    # one text at a time, without padding
    outputs = []
    for row in ROWS:
        label = torch.tensor([row["label"] == "praise"]).long()
        outputs.append(theirs(**inputs(tmp_path / "base", row["text"]), labels=label))
    want = sum(output.loss for output in outputs)
    want.backward()
    gradients = {}
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            name = name.removeprefix("base_model.model.").replace("miss_block.default", "block")
            gradients[name.replace("modules_to_save.default.", "")] = p.grad

    found = one_step(forked, tmp_path / "adapter", "classify", ROWS)
    logits = torch.cat([output.logits for output in outputs]).detach()
    torch.testing.assert_close(found["logits"], logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["loss"], want.detach(), atol=0, rtol=1e-6)
    ours = {name: gradient for name, gradient in found["gradients"].items() if gradient is not None}
    assert ours.keys() == gradients.keys() and sum("block" in name for name in ours) == 6
    for name, gradient in ours.items():
        error = (gradient - gradients[name]).abs().max()
        assert error <= 1e-5 * gradients[name].abs().max(), f"{name}: {error:.2e}"


CHECKS = """
import torch
from minift.adapters import miss
from minift.data.batch import token_keys
from minift.layers import Linear
from minift.ops.dropout import Noise

# what the layer computes is its matrix, also where the rank does not divide the inputs, or is as large
for width, rank in ((32, 8), (33, 8), (7, 7), (7, 5), (1, 1)):
    base = Linear(width, 9)
    torch.nn.init.normal_(base.weight), torch.nn.init.normal_(base.bias)
    layer = miss.MissLinear(base, rank, 0.3, 5)
    torch.nn.init.normal_(layer.block)
    x = torch.randn(6, width)
    want = x.double() @ layer.matrix(torch.float64).T + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16

    # dropout is one of a token, whichever others are beside it
    keys = token_keys(torch.arange(6), torch.zeros(6, dtype=torch.int64))
    together, apart = layer(x, Noise(1, 2, keys)), [layer(x[i : i + 1], Noise(1, 2, keys[i : i + 1])) for i in range(6)]
    assert width == 1 or not torch.equal(together, layer(x))
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)

# what PEFT can, and this file cannot, is refused by its name
for key, value in (("init_weights", "bat"), ("init_weights", "mini"), ("bias", "all"), ("use_more", True), ("r", "8")):
    try:
        miss.read({key: value}, ())
    except ValueError as e:
        assert str(e).startswith(f"{key} is {value!r}"), e
    else:
        raise AssertionError(key)
print("equal")
"""


@pytest.mark.slow
def test_the_layer_is_its_matrix_and_variants_are_refused(forked):
    assert in_fork(forked, CHECKS) == "equal\n"


@pytest.mark.slow
def test_it_is_trained_and_merged_and_peft_loads_it(forked, tmp_path):
    base = classifier(tmp_path / "base")
    reviews(tmp_path / "train.tsv", 128)
    data = reviews(tmp_path / "valid.tsv", 32, seed=1)
    train = "train --model {t}/base --task classify --data {t}/train.tsv --method miss --rank 16 --targets all-linear"
    said = commands(
        forked,
        train + " --epochs 8 --batch 8 --lr 5e-3 --dropout 0 --adapter-dropout 0 --out {t}/run",
        "eval --model {t}/run --data {t}/valid.tsv --json",
        "predict --model {t}/run --data {t}/valid.tsv",
        "merge --model {t}/run --out {t}/merged",
        t=tmp_path,
    )
    assert said[1].last["accuracy"] > 0.85
    texts = [line.split("\t")[0] for line in data.read_text().splitlines()]
    found = torch.tensor([[row["scores"][name] for name in NAMES.values()] for row in said[2].rows])
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(scores(merged, tmp_path / "base", texts), found, atol=1e-5, rtol=0)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run/last").eval()
    torch.testing.assert_close(scores(adapted, tmp_path / "base", texts), found, atol=1e-5, rtol=0)
