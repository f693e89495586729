"""Adapters from the outside: what is saved for backward, how files, merging, freezing and every method behave in a run.

python -m pytest tests/test_adapters.py
"""

import shutil

import pytest
import torch
import transformers
from folders import rewrite, weights_in
from helpers import (
    fails,
    losses,
    metrics,
    model_and_data,
    peer,
    random_ids,
    reviews,
    sequence,
    small_bert,
    train,
    works,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift import training
from minift.adapters import adapt, saved_as
from minift.adapters.learned import effective_rank, learned, singular_values
from minift.adapters.lora import adapters
from minift.checkpoints.merging import merge_layers
from minift.data.batch import pack
from minift.errors import InputError
from minift.layers.nf4 import Packed as NF4Linear
from minift.ops.dropout import Noise
from minift.tables import METHODS


@pytest.fixture
def folder(tmp_path):
    return model_and_data(tmp_path, 40) / "model"


BATCH = pack([sequence(i, ids, rows=[0]) for i, ids in enumerate(random_ids([9, 5], 50))])
TRAIN = "train --model {model} --data {f}/train.tsv --out {out} --epochs 2"


def options(folder, out) -> dict:
    """The places of a short run on 40 reviews."""
    return dict(model=folder, f=folder.parent, out=out)


# what is trained


@pytest.mark.parametrize("method, trained", [
    ("lora", {"A", "B", "head"}),
    ("dora", {"A", "B", "magnitude", "head"}),
    ("pissa", {"A", "B", "head"}),
    ("lora-fa", {"B", "head"}),
    ("head", {"head"}),
    ("bias", {"bias", "head"}),
    ("norm", {"norm", "head"}),
    ("last-1", {"layer 1", "head"}),
    ("full", {"all"}),
])  # fmt: skip
def test_what_learns(folder, method, trained):
    model, _ = minift.load(folder, task="classify")
    adapt(model, method)

    def kind(name):
        leaf = name.rpartition(".")[2]
        if method == "full":
            return "all"
        if name.startswith("head."):
            return "head"
        if method == "last-1":
            return "layer 1" if ".layers.1." in name else name
        return "norm" if method == "norm" and ".norm." in name else leaf

    found = {kind(name) for name, p in model.named_parameters() if p.requires_grad}
    assert found == trained
    if method == "full":
        assert all(p.requires_grad for p in model.parameters())


def test_a_fresh_pooler_is_trained_and_saved(tmp_path):
    """A checkpoint without a pooler: what was drawn at random must not be lost."""
    folder = small_bert(tmp_path / "model")
    rewrite(folder, {k: v for k, v in weights_in(folder).items() if "pooler" not in k})
    model, _ = minift.load(folder, task="classify")
    minift.add_lora(model, base=str(folder))
    assert model.head.pooler.weight.requires_grad
    minift.save(model, None, tmp_path / "adapter")
    again, _ = minift.load(tmp_path / "adapter", fresh_head=False, seed=1)
    assert torch.equal(again.head.pooler.weight, model.head.pooler.weight)


def test_nothing_matched_lists_what_there_is(folder):
    model, _ = minift.load(folder, task="classify")
    words = r"no layer has such a name; there are:\n(.*\n)*  bert.encoder.layer.N.attention"
    with pytest.raises(InputError, match=words):
        minift.add_lora(model, targets="c_attn")


@pytest.mark.parametrize("wrong, words", [
    ({"rank": 0}, "rank is 0; expected at least 1"),
    ({"dropout": 1.0}, "adapter dropout is 1.0; expected at least 0 and below 1"),
    ({"rank_pattern": {"query": 0}}, "rank is 0"),
    ({"layers": (9,)}, "in layers 9: no layer"),
], ids=str)  # fmt: skip
def test_wrong_values_are_refused(folder, wrong, words):
    model, _ = minift.load(folder, task="classify")
    with pytest.raises(InputError, match=words):
        minift.add_lora(model, **wrong)


def test_twice_is_refused(folder):
    model, _ = minift.load(folder, task="classify")
    minift.add_lora(model)
    with pytest.raises(InputError, match="has an adapter already"):
        minift.add_lora(model)


# variants


@pytest.mark.parametrize("method", [name for name in METHODS if name != "last-K" and saved_as(name) == "lora"])
def test_a_variant_begins_where_the_model_was(folder, method):
    """Before training nothing has changed; but for LoftQ, whose base is packed: nearer than plain NF4 is."""
    plain, _ = minift.load(folder, task="classify")
    model, _ = minift.load(folder, task="classify")
    packed, _ = minift.load(folder, task="classify", base="nf4")
    adapt(model, method, rank=4, targets="all-linear")
    if method == "loftq":
        weights = {model.hub_name(n): m.weight.detach() for n, m in plain.named_modules() if hasattr(m, "matrix")}
        minift.quantize(model)
        names = {packed.hub_name(n): m for n, m in packed.named_modules() if isinstance(m, NF4Linear)}
        for hub, lora in adapters(model):
            if hub in names:
                before = (names[hub].matrix(torch.float32) - weights[hub]).norm()
                assert (lora.matrix(torch.float32) - weights[hub]).norm() < 0.9 * before, hub
    else:
        assert torch.allclose(model.logits(BATCH), plain.logits(BATCH), atol=1e-5)


def test_pissa_and_loftq_need_the_original_weights(folder):
    for method in ("pissa", "loftq"):
        model, _ = minift.load(folder, task="classify", base="nf4")
        with pytest.raises(InputError, match="its weight is packed; expected the original"):
            adapt(model, method)


def test_adapter_dropout_is_the_tokens_own(folder):
    """Masks do not depend on the packing: one by one and together are the same."""
    model, _ = minift.load(folder, task="classify", dropout=0.0)
    minift.add_lora(model, dropout=0.5, seed=1)
    with torch.no_grad():
        for _, lora in adapters(model):
            lora.B.normal_(generator=torch.Generator().manual_seed(2))
    items = [sequence(i, x, rows=[0]) for i, x in enumerate(random_ids([9, 5, 12], 50))]

    def states(sequences):
        batch = pack(sequences)
        return model(batch, Noise(3, 4, batch.keys))

    together = states(items)
    assert torch.allclose(together, torch.cat([states([s]) for s in items]), atol=1e-5)
    assert not torch.allclose(together, model(pack(items)), atol=1e-2)


# saved for backward


def saved_values(model, batch, noise) -> int:
    """Numbers saved for backward by a forward pass through the body, each storage once, without the model's own."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def note(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned and t.is_floating_point():
            # the tensor keeps its address its own
            found[storage.data_ptr()] = storage.nbytes() // t.element_size(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        keep = model.body(batch, noise)  # noqa: F841 as long as the graph lives, so do its tensors
    return sum(n for n, _ in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["", "nf4"])
@pytest.mark.parametrize("cls", [transformers.BertForSequenceClassification, transformers.GPT2LMHeadModel])
def test_saved_activations_of_lora(cls, base, tmp_path):
    """At most 12 values of width C a token and layer, whatever the base: the difference that six layers more make."""
    width, tokens = 64, 40
    bert = "Bert" in cls.__name__
    counts = []
    for n in (2, 8):
        sizes = {"n_layer": n, "n_embd": width}
        if bert:
            sizes = {"num_hidden_layers": n, "hidden_size": width, "intermediate_size": 4 * width}
        peer(cls, tmp_path / str(n), **sizes)
        model, _ = minift.load(tmp_path / str(n), task="classify" if bert else "complete", base=base)
        minift.add_lora(model)
        batch = pack([sequence(0, random_ids([tokens])[0], rows=[0])])
        counts.append(saved_values(model, batch, Noise(1, 2, batch.keys)))
    assert (counts[1] - counts[0]) / 6 / tokens / width <= 12


# merging


@pytest.mark.parametrize("base", ["", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("into", ["original", "dequantized", "nf4"])
def test_merging(folder, method, base, into, tmp_path):
    """Into what was trained on: the same logits. Otherwise the error is told, and is the error there is."""
    model, _ = minift.load(folder, task="classify", base=base)
    adapt(model, method, rank=4)
    with torch.no_grad():
        for _, lora in adapters(model):
            lora.B.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    minift.save(model, None, tmp_path / "adapter")
    out = tmp_path / "merged"
    merged, _, cost = minift.merge(minift.MergeConfig(model=str(tmp_path / "adapter"), out=str(out), into=into))
    assert len(cost.layers) == 4 and merged.adapter is None
    exact = into == "dequantized" or into == "original" and not base
    if exact:
        assert cost.logits < 1e-5 and max(cost.layers.values()) < 1e-6
    else:
        assert 0.01 < min(cost.layers.values()) < max(cost.layers.values()) < 0.5 and cost.logits > 1e-4
    assert any(isinstance(m, NF4Linear) for m in merged.modules()) == (into == "nf4")
    minift.save(merged, None, out)
    again, _ = minift.load(out, task="classify", fresh_head=False)
    assert torch.allclose(again.logits(BATCH), merged.logits(BATCH), atol=1e-6)
    if exact:
        assert torch.allclose(again.logits(BATCH), model.logits(BATCH), atol=1e-5)


def test_merging_leaves_a_plain_model(folder):
    model, _ = minift.load(folder, task="classify")
    names = set(dict(model.named_parameters()))
    minift.add_lora(model, targets="all-linear")
    merge_layers(model, "dequantized")
    assert set(dict(model.named_parameters())) == names and all(p.requires_grad for p in model.parameters())


# what was learned


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_singular_values_are_those_of_the_product(rank, rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
    want = torch.linalg.svdvals(b.double() @ a.double())
    got = singular_values(a, b)
    n = min(len(got), len(want))
    assert torch.allclose(got[:n], want[:n], atol=1e-5) and want[n:].sum() < 1e-5


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def test_what_was_learned(folder):
    model, _ = minift.load(folder, task="classify")
    minift.add_lora(model, rank=2, targets="query")
    assert [u.norm for u in learned(model)] == [0, 0]
    with torch.no_grad():
        for _, lora in adapters(model):
            lora.B.normal_()
    for u, (name, lora) in zip(learned(model), adapters(model), strict=True):
        assert u.layer == name and u.rank == 2 and 1 <= u.effective_rank <= 2
        assert u.norm == pytest.approx((lora.delta().norm() / lora.base.weight.norm()).item(), rel=1e-4)


# whole runs


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    "--method lora --base nf4",
    "--method dora --targets all-linear",
    "--method pissa",
    "--method pissa --base nf4",
    "--method loftq --base nf4",
    "--method lora-fa --lora-plus 16 --rslora",
    "--method bias --base nf4",
    "--method lora --precision bf16 --rank-pattern query=2",
])  # fmt: skip
def test_a_run_is_evaluated_from_its_folder_and_resumed(folder, more, tmp_path):
    """eval from the run folder gives the last validation's figures; half a run and the rest give the same losses."""
    reviews(tmp_path / "valid.tsv", 21, seed=9)
    whole, half = tmp_path / "whole", tmp_path / "half"
    line = f"{TRAIN} --valid {{f}}/valid.tsv --save-every 4 --keep 9 {more}"
    works(line, **options(folder, whole))
    told = metrics(whole)[-1]
    found = works("eval --model {out}/last --data {f}/valid.tsv --json", **options(folder, whole)).last
    assert found["loss"] == pytest.approx(told["eval/loss"], abs=2e-3 if "bf16" in more else 1e-5)
    works(line, **options(folder, half))
    for step in (4, 0):  # after a checkpoint, and before the first
        stop_after(half, step)
        works("train --resume --out {half}", half=half)
        assert losses(half) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--method lora --targets all-linear", "--method pissa"])
def test_transformers_auto_classes_load_a_run_folder(folder, more, tmp_path):
    """As they load PEFT's own: the base that it names, and the adapter with its head.

    So the names of the classes are the base's; and of DoRA they lose the lengths, of PEFT's own folders too.
    """
    works(f"{TRAIN} {more}", **options(folder, tmp_path / "run"))
    model, tokenizer = minift.load(tmp_path / "run", task="classify")
    batch = pack([sequence(0, tokenizer.encode(["a good film"])[0].ids, rows=[0])])
    ids = batch.ids[None]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/last")
    torch.testing.assert_close(theirs(ids).logits, model.logits(batch), atol=1e-5, rtol=1e-4)
    assert model.labels == ["blame", "praise"]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "run/last")) == tokenizer.vocab_size


def test_an_adapter_folder_of_an_older_minift(folder, tmp_path):
    """Its settings were called config.json: labels and the longest sequence are still found there."""
    works(f"{TRAIN} --method lora --base nf4 --max-length 20", **options(folder, tmp_path / "run"))
    new, _ = minift.load(tmp_path / "run", task="classify")
    (tmp_path / "run/last/minift-model.json").rename(tmp_path / "run/last/config.json")
    old, _ = minift.load(tmp_path / "run", task="classify")
    assert old.labels == new.labels == ["blame", "praise"] and old.max_length == new.max_length == 20
    assert torch.equal(old.logits(BATCH), new.logits(BATCH))
    assert any(isinstance(module, NF4Linear) for module in old.modules())


def stop_after(out, step) -> None:
    """Makes a finished run look like one that was killed after a step."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.mark.slow
def test_a_run_from_python_can_be_repeated_by_its_config(folder, tmp_path):
    model, tokenizer = minift.load(folder, task="classify", labels=["blame", "praise"], base="nf4")
    minift.add_lora(model, rank=3, alpha=6, targets="query,key", rank_pattern={"key": 2}, rslora=True)
    train(model, tokenizer, tmp_path / "train.tsv", tmp_path / "a", epochs=1)
    works("train --config {f}/a/config.json --out {f}/b", f=tmp_path)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_frozen_weights_are_kept_in_the_activations_dtype(folder, tmp_path, monkeypatch):
    """Under an adapter; but not where they are saved with the model, which would round them."""
    kinds, loop = {}, training.loop

    def watched(job, *rest):
        kinds.update({name: p.dtype for name, p in job.model.named_parameters()})
        return loop(job, *rest)

    monkeypatch.setattr(training, "loop", watched)
    works(f"{TRAIN} --method lora --precision bf16", **options(folder, tmp_path / "lora"))
    frozen, trained = ("base.weight", "key.weight", "word.weight"), (".A", ".B", "head.out.weight", "norm.weight")
    assert {t for n, t in kinds.items() if n.endswith(frozen)} == {torch.bfloat16}
    assert {t for n, t in kinds.items() if n.endswith(trained)} == {torch.float32}
    works(f"{TRAIN} --method head --precision bf16", **options(folder, tmp_path / "head"))
    model, _ = minift.load(tmp_path / "head", task="classify")
    plain, _ = minift.load(folder, task="classify")
    assert torch.equal(model.body.embeddings.word.weight, plain.body.embeddings.word.weight)


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(folder, tmp_path):
    works(f"{TRAIN} --method lora", **options(folder, tmp_path / "a"))
    works(f"{TRAIN} --method lora", **options(tmp_path / "a", tmp_path / "b"))
    assert losses(tmp_path / "b")[0] != losses(tmp_path / "a")[0]
    model, _ = minift.load(tmp_path / "b")
    assert model.adapter.base == str(folder.resolve())
    fails(f"{TRAIN} --method full", **options(tmp_path / "a", tmp_path / "c"))


@pytest.mark.parametrize("more, words", [
    ("--method full --base nf4", "weights in 4 bits do not learn"),
    ("--method loftq", "expected --base nf4"),
    ("--method lore", "--method is 'lore'"),
    ("--method lora --layers a", "--layers is 'a'"),
    ("--method lora --rank-pattern query", "--rank-pattern is 'query'"),
])  # fmt: skip
def test_options_that_do_not_go_together(folder, more, words, tmp_path):
    fails(f"{TRAIN} {more}", words, code=2, **options(folder, tmp_path / "run"))


def test_the_last_k_layers_are_counted(folder, tmp_path):
    fails(f"{TRAIN} --method last-3", "expected last-1 to last-2", **options(folder, tmp_path / "run"))


def test_inspect_and_merge_from_the_command_line(folder, tmp_path):
    works(f"{TRAIN} --method lora --base nf4", **options(folder, tmp_path / "run"))
    out = works("inspect --model {f}/run", f=tmp_path).out
    assert "uint8" in out and "bert.encoder.layer.1.attention.self.value" in out.split("learned on top of")[1]
    said = works("merge --model {f}/run --out {f}/merged", f=tmp_path)
    assert "logits: relative error" in said.out
    transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    fails("merge --model {f}/run --out {f}/merged", f=tmp_path)
    fails("merge --model {folder} --out {f}/other", "has no adapter", folder=folder, f=tmp_path)
