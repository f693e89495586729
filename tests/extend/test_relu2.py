"""A fork's operator, complete in two files (relu2.py, relu2.cpp): squared ReLU, judged as the others are, and trained.

python -m pytest tests/extend/test_relu2.py
"""

import pytest
import torch
import transformers
from forks import check_gradients, commands, fork, in_fork, one_step
from helpers import VOCABULARY, peer, reviews, small_bert

from minift.ops import compile

try:
    compile.compiler()
except compile.Unavailable as e:
    pytest.skip(str(e), allow_module_level=True)

ROWS = [{"text": "a good film", "label": "LABEL_1"}, {"text": "the plot was so dull and bad", "label": "LABEL_0"}]


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """minift with an operator's two files more, and the lines of who calls it."""
    return fork(
        tmp_path_factory.mktemp("fork"),
        {"relu2.py": "minift/ops/relu2.py", "relu2.cpp": "kernels/cpu/relu2.cpp"},
        {"from . import native": "from .relu2 import relu2", "ACTIVATIONS = {": '    "relu2": relu2,'},
        place="minift/ops/gelu.py",
    )


CHECKS = """
import torch
import torch.nn.functional as F
from judging import equal_bits, in_both_modes, in_mode, judge, results
from minift.ops import native
from minift.ops.gelu import ACTIVATIONS
from minift.ops.linear import linear
from minift.ops.relu2 import relu2
from minift.ops.rematerialise import rematerialise

assert ACTIVATIONS["relu2"] is relu2
native.use("auto")
library = native.load_kernel("relu2")
called = []

class Counted:
    def __getattr__(self, name):
        called.append(name)
        return getattr(library, name)

native.loaded["relu2", native.CPU] = Counted()

# float64 is the judge, at odd sizes, several threads' worth and none; kernel and reference give the same bits
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((), (0,), (1,), (7,), (33, 63), (5, 1023), (3, 40001)):
        for scale in (1e-3, 1, 30):
            x = (scale * torch.randn(shape)).to(dtype).requires_grad_()
            dy = [torch.randn(shape)]
            before = len(called)
            ours, want = in_both_modes(results, relu2, [x], dy)
            assert called[before:] == ["relu2_forward", "relu2_backward"], called[before:]
            assert equal_bits(ours, want)
            judge(relu2, [x], dy)
            plain = results(lambda x: F.relu(x).square(), [x], dy)
            assert equal_bits(ours, plain)

# a transposed view; inf, NaN, subnormals and a negative zero
x = torch.randn(9, 5).t().requires_grad_()
assert equal_bits(*in_both_modes(results, relu2, [x], [torch.randn(5, 9)]))
x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0, 1e-38, 1e-22, 1e30, -3.0]).requires_grad_()
ours, want = in_both_modes(results, relu2, [x], [torch.ones(9)])
assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(ours, want, strict=True)), (ours, want)
assert ours[0][2].isnan() and ours[1][2].isnan()

# other dtypes run the reference, and modes are kept to
before = len(called)
assert relu2(torch.tensor([3.0], dtype=torch.float64)).item() == 9
assert in_mode("reference", relu2, torch.tensor([3.0])).item() == 9
assert len(called) == before

# a linear layer after it keeps the recipe of y, and not y
x, w = torch.randn(50, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
want = torch.autograd.grad(linear(relu2(x), w, None).square().sum(), (x, w))
with rematerialise():
    loss = linear(relu2(x), w, None).square().sum()
before = called.count("relu2_forward")
assert equal_bits(torch.autograd.grad(loss, (x, w)), want) and called.count("relu2_forward") == before + 1
print("equal")
"""


@pytest.mark.slow
def test_error_bits_extremes_and_recomputation(forked):
    assert in_fork(forked, CHECKS) == "equal\n"


@pytest.mark.slow
def test_a_bert_with_it_equals_transformers_and_is_trained(forked, tmp_path):
    options = dict(vocab_size=64, hidden_size=32, intermediate_size=63, hidden_act="relu2")
    small_bert(tmp_path / "model")
    theirs = peer(transformers.BertForSequenceClassification, tmp_path / "model", scale=0.1, **options)
    outputs = []
    for row in ROWS:  # one at a time, without padding
        ids = [2, *(VOCABULARY.index(word) for word in row["text"].split()), 3]
        label = torch.tensor([int(row["label"][-1])])
        outputs.append(theirs(input_ids=torch.tensor([ids]), labels=label))
    want = sum(output.loss for output in outputs)
    want.backward()
    found = one_step(forked, tmp_path / "model", "classify", ROWS)
    logits = torch.cat([output.logits for output in outputs]).detach()
    torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["loss"], want.detach(), atol=0, rtol=1e-5)
    check_gradients(found["gradients"], theirs)

    reviews(tmp_path / "train.tsv", 128)
    reviews(tmp_path / "valid.tsv", 32, seed=1)
    said = commands(
        forked,
        "train --model {t}/model --task classify --data {t}/train.tsv --epochs 8 --batch 8 --lr 3e-3 --dropout 0 "
        "--out {t}/run",
        "eval --model {t}/run --data {t}/valid.tsv --json",
        t=tmp_path,
    )
    assert said[1].last["accuracy"] > 0.85
    assert transformers.BertConfig.from_pretrained(tmp_path / "run/last").hidden_act == "relu2"
