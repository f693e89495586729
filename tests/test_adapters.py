"""Adapters from the outside: what is saved for backward, how files, merging, freezing and every method behave in a run.

python -m pytest tests/test_adapters.py
"""

import json
import shutil

import pytest
import torch
import transformers
from helpers import peer, random_ids, reviews, sequence, small_bert
from hypothesis import given, settings
from hypothesis import strategies as st

import minift
from minift import cli, training
from minift.adapters import VARIANTS, apply
from minift.adapters.learned import effective_rank, learned, singular_values
from minift.adapters.lora import adapters
from minift.checkpoints.merging import merge_layers
from minift.data.batch import pack
from minift.errors import InputError
from minift.layers.nf4 import NF4Linear
from minift.ops.dropout import Noise


@pytest.fixture
def folder(tmp_path):
    return small_bert(tmp_path / "model")


def options(folder, out, *more):
    """A short run on 40 reviews."""
    data = folder.parent / "train.tsv"
    if not data.exists():
        reviews(data, 40)
    return ["train", "--model", str(folder), "--data", str(data), "--out", str(out), "--epochs", "2", *more]


def losses(out) -> list[float]:
    return [json.loads(line)["train/loss"] for line in open(out / "metrics.jsonl")]


# what is trained


@pytest.mark.parametrize(
    "method, trained",
    [
        ("lora", {"A", "B", "head"}),
        ("dora", {"A", "B", "magnitude", "head"}),
        ("pissa", {"A", "B", "head"}),
        ("lora-fa", {"B", "head"}),
        ("head", {"head"}),
        ("bias", {"bias", "head"}),
        ("norm", {"norm", "head"}),
        ("last-1", {"layer 1", "head"}),
        ("full", {"all"}),
    ],
)
def test_what_learns(folder, method, trained):
    model, _ = minift.load(folder, task="classify")
    apply(model, method)

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
    weights = tmp_path / "model/model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(weights).items() if "pooler" not in k}, weights, {"format": "pt"})
    model, _ = minift.load(folder, task="classify")
    minift.add_lora(model, base=str(folder))
    assert model.head.pooler.weight.requires_grad
    minift.save(model, None, tmp_path / "adapter")
    again, _ = minift.load(tmp_path / "adapter", fresh_head=False, seed=1)
    assert torch.equal(again.head.pooler.weight, model.head.pooler.weight)


def test_nothing_matched_lists_what_there_is(folder):
    model, _ = minift.load(folder, task="classify")
    with pytest.raises(
        InputError, match=r"no layer has such a name; there are:\n(.*\n)*  bert.encoder.layer.N.attention"
    ):
        minift.add_lora(model, targets="c_attn")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"dropout": 1.0}, "adapter dropout is 1.0; expected at least 0 and below 1"),
        ({"rank_pattern": {"query": 0}}, "rank is 0"),
        ({"layers": (9,)}, "in layers 9: no layer"),
    ],
    ids=str,
)
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


@pytest.mark.parametrize("method", VARIANTS)
def test_a_variant_begins_where_the_model_was(folder, method):
    """Before training nothing has changed; but for LoftQ, whose base is packed: nearer than plain NF4 is."""
    ids = random_ids([9, 5], 50)
    batch = pack([sequence(i, x, rows=[0]) for i, x in enumerate(ids)])
    plain, _ = minift.load(folder, task="classify")
    model, _ = minift.load(folder, task="classify")
    packed, _ = minift.load(folder, task="classify", base="nf4")
    apply(model, method, rank=4, targets="all-linear")
    if method == "loftq":
        weights = {model.hub_name(n): m.weight.detach() for n, m in plain.named_modules() if hasattr(m, "matrix")}
        minift.quantize(model)
        names = {packed.hub_name(n): m for n, m in packed.named_modules() if isinstance(m, NF4Linear)}
        for hub, lora in adapters(model):
            if hub in names:
                before = (names[hub].matrix(torch.float32) - weights[hub]).norm()
                assert (lora.matrix(torch.float32) - weights[hub]).norm() < 0.9 * before, hub
    else:
        assert torch.allclose(model.logits(batch), plain.logits(batch), atol=1e-5)


def test_pissa_and_loftq_need_the_original_weights(folder):
    for method in ("pissa", "loftq"):
        model, _ = minift.load(folder, task="classify", base="nf4")
        with pytest.raises(InputError, match="its weight is in 4 bits; expected the original"):
            apply(model, method)


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
            found[storage.data_ptr()] = (
                storage.nbytes() // t.element_size(),
                t,
            )  # the tensor keeps its address its own
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
        sizes = (
            {"num_hidden_layers": n, "hidden_size": width, "intermediate_size": 4 * width}
            if bert
            else {"n_layer": n, "n_embd": width}
        )
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
    apply(model, method, rank=4, base=str(folder))
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
    batch = pack([sequence(i, x, rows=[0]) for i, x in enumerate(random_ids([9, 5], 50))])
    again, _ = minift.load(out, task="classify", fresh_head=False)
    assert torch.allclose(again.logits(batch), merged.logits(batch), atol=1e-6)
    if exact:
        assert torch.allclose(again.logits(batch), model.logits(batch), atol=1e-5)


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
@pytest.mark.parametrize(
    "more",
    [
        ["--method", "lora", "--base", "nf4"],
        ["--method", "dora", "--targets", "all-linear"],
        ["--method", "pissa"],
        ["--method", "pissa", "--base", "nf4"],
        ["--method", "loftq", "--base", "nf4"],
        ["--method", "lora-fa", "--lora-plus", "16", "--rslora"],
        ["--method", "bias", "--base", "nf4"],
        ["--method", "lora", "--precision", "bf16", "--rank-pattern", "query=2"],
    ],
    ids=" ".join,
)
def test_a_run_is_evaluated_from_its_folder_and_resumed(folder, more, tmp_path, capsys):
    """eval from the run folder gives the last validation's figures; half a run and the rest give the same losses."""
    data = str(reviews(tmp_path / "valid.tsv", 21, seed=9))
    whole, half = tmp_path / "whole", tmp_path / "half"
    often = ["--valid", data, "--save-every", "4", "--keep", "9", *more]
    assert cli.main(options(folder, whole, *often)) == 0
    told = json.loads(open(whole / "metrics.jsonl").readlines()[-1])
    capsys.readouterr()
    assert cli.main(["eval", "--model", str(whole / "last"), "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["loss"] == pytest.approx(told["eval/loss"], abs=2e-3 if "bf16" in more else 1e-5)
    assert cli.main(options(folder, half, *often)) == 0
    for step in (4, 0):  # after a checkpoint, and before the first
        stop_after(half, step)
        assert cli.main(["train", "--resume", "--out", str(half)]) == 0
        assert losses(half) == losses(whole)


def stop_after(out, step) -> None:
    """Makes a finished run look like one that was killed after a step."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.mark.slow
def test_a_run_from_python_can_be_repeated_by_its_config(folder, tmp_path):
    data = str(reviews(tmp_path / "train.tsv", 40))
    model, tokenizer = minift.load(folder, task="classify", labels=["blame", "praise"], base="nf4")
    minift.add_lora(model, rank=3, alpha=6, targets="query,key", rank_pattern={"key": 2}, rslora=True)
    minift.train(model, tokenizer, minift.TrainConfig(data=data, out=str(tmp_path / "a"), epochs=1))
    assert cli.main(["train", "--config", str(tmp_path / "a/config.json"), "--out", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "b") == losses(tmp_path / "a")


def test_frozen_weights_are_kept_in_the_activations_dtype(folder, tmp_path, monkeypatch):
    """Under an adapter; but not where they are saved with the model, which would round them."""
    kinds, loop = {}, training.loop

    def watched(job, *rest):
        kinds.update({name: p.dtype for name, p in job.model.named_parameters()})
        return loop(job, *rest)

    monkeypatch.setattr(training, "loop", watched)
    assert cli.main(options(folder, tmp_path / "lora", "--method", "lora", "--precision", "bf16")) == 0
    assert {t for n, t in kinds.items() if n.endswith(("base.weight", "key.weight", "word.weight"))} == {torch.bfloat16}
    assert {t for n, t in kinds.items() if n.endswith((".A", ".B", "head.out.weight", "norm.weight"))} == {
        torch.float32
    }
    assert cli.main(options(folder, tmp_path / "head", "--method", "head", "--precision", "bf16")) == 0
    model, _ = minift.load(tmp_path / "head", task="classify")
    plain, _ = minift.load(folder, task="classify")
    assert torch.equal(model.body.embeddings.word.weight, plain.body.embeddings.word.weight)


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(folder, tmp_path):
    assert cli.main(options(folder, tmp_path / "a", "--method", "lora")) == 0
    assert cli.main(options(tmp_path / "a", tmp_path / "b", "--method", "lora")) == 0
    assert losses(tmp_path / "b")[0] != losses(tmp_path / "a")[0]
    model, _ = minift.load(tmp_path / "b")
    assert model.adapter.base == str(folder.resolve())
    assert cli.main(options(tmp_path / "a", tmp_path / "c", "--method", "full")) == 1


@pytest.mark.parametrize(
    "more, words",
    [
        (["--method", "full", "--base", "nf4"], "weights in 4 bits do not learn"),
        (["--method", "loftq"], "expected --base nf4"),
        (["--method", "lore"], "--method is 'lore'"),
        (["--method", "lora", "--layers", "a"], "--layers is 'a'"),
        (["--method", "lora", "--rank-pattern", "query"], "--rank-pattern is 'query'"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(folder, more, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(options(folder, tmp_path / "run", *more))
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_the_last_k_layers_are_counted(folder, tmp_path, capsys):
    assert cli.main(options(folder, tmp_path / "run", "--method", "last-3")) == 1
    assert "expected last-1 to last-2" in capsys.readouterr().err


def test_inspect_and_merge_from_the_command_line(folder, tmp_path, capsys):
    assert cli.main(options(folder, tmp_path / "run", "--method", "lora", "--base", "nf4")) == 0
    capsys.readouterr()
    assert cli.main(["inspect", "--model", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "uint8" in out and "bert.encoder.layer.1.attention.self.value" in out.split("learned on top of")[1]
    assert cli.main(["merge", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert "logits: relative error" in capsys.readouterr().out
    transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert cli.main(["merge", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 1
    assert cli.main(["merge", "--model", str(folder), "--out", str(tmp_path / "other")]) == 1
    assert "has no adapter" in capsys.readouterr().err
