"""Really trained weights give their published answers.

MINIFT_ASSETS=../shared python -m pytest tests/test_weights.py
"""

import base64
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import sequence

import minift
from minift.data.batch import pack

pytestmark = pytest.mark.slow


def test_minilm_similarities(minilm):
    """The model card's three sentences: mean of the token states, normalised, dot products to four digits."""
    model, tokenizer = minift.load(minilm)
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    batch = pack([sequence(i, t.ids) for i, t in enumerate(tokenizer.encode(texts))])
    with torch.no_grad():
        states = model(batch).split(batch.offsets.diff().tolist())
    e = torch.nn.functional.normalize(torch.stack([s.mean(0) for s in states]), dim=-1)
    found = [round((e[i] @ e[j]).item(), 4) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found == [0.6660, 0.1046, 0.1411]
    assert any("pooler" in name for name in model.report.unused)  # and position_ids was dropped in silence


@pytest.fixture(scope="module")
def nano(assets):
    return minift.load(assets / "weights/gpt-nano-sort/hf", task="complete")[0]


def test_gpt_nano_sorts(nano):
    """All 729 inputs of six letters, continued greedily by six."""
    inputs = torch.tensor(list(itertools.product(range(3), repeat=6)))  # (729, 6)
    tokens = inputs
    for _ in range(6):
        batch = pack([sequence(i, x, rows=[len(x) - 1]) for i, x in enumerate(tokens.tolist())])
        with torch.no_grad():
            tokens = torch.cat([tokens, nano.logits(batch).argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens[:, 6:], inputs.sort(dim=1).values)


def test_gpt_nano_activations(nano, assets):
    """Every stage that was published with the model, within 1e-5."""
    published = json.loads((assets / "weights/gpt-nano-sort/gpt-nano-sort-t0-partials.json").read_text())

    def stage(name):
        data = np.frombuffer(base64.b64decode(published[name]["data"]), np.float32).reshape(published[name]["shape"])
        return torch.from_numpy(data.copy())

    found, body = {}, nano.body

    def keep(name, module):
        module.register_forward_hook(lambda _, x, y: found.__setitem__(name, y))

    for name, module in {
        "ln1": body.h[0].ln_1,
        "qkv": body.h[0].attn.c_attn,
        "yProj": body.h[0].attn.c_proj,
        "fc": body.h[0].mlp.c_fc,
        "mlp": body.h[0].mlp,
        "tok_emb": body.wte,
    }.items():
        keep(name, module)
    body.h[0].mlp.c_proj.register_forward_pre_hook(lambda _, x: found.__setitem__("gelu", x[0]))
    body.h[0].attn.c_proj.register_forward_pre_hook(lambda _, x: found.__setitem__("y", x[0]))
    ids = stage("idx").long().tolist()
    batch = pack([sequence(i, x) for i, x in enumerate(ids)])
    with torch.no_grad():
        found["ln_f"] = nano(batch)
        found["lm_head"] = nano.head.out(found["ln_f"])
    found["probs"] = found["lm_head"].softmax(-1)
    assert len(found) == 11
    for name, value in found.items():
        want = stage(name)
        assert (value.view_as(want) - want).abs().max() <= 1e-5 * max(1, want.abs().max()), name
