"""Checkpoints: every layout that the hub has, every fault with its message, and folders that transformers loads back.

python -m pytest tests/test_hub.py
"""

import json
import pickle
import re
import shutil
import sys
from functools import partial

import pytest
import torch
import transformers
from folders import configure, names_in, no_file_beyond, put, refuse, refused, rewrite, weights_in, write
from helpers import logits, peer, python, random_ids, sequence
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import minift
from minift.checkpoints import hub, weights
from minift.data.batch import pack
from minift.engine import memory

# layouts


def test_bare_names(bert, gpt2):
    """bert. and transformer. left out, as in files of the body alone and of openai-community/gpt2."""
    for folder, task, prefix in ((bert, "classify", "bert."), (gpt2, "complete", "transformer.")):
        want = logits(folder, task)
        rewrite(folder, {k.removeprefix(prefix): v for k, v in weights_in(folder).items()})
        assert torch.equal(logits(folder, task), want)


def test_legacy_names_and_buffers(bert):
    want = logits(bert)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {re.sub("|".join(old), lambda found: old[found[0]], k): v for k, v in weights_in(bert).items()}
    rewrite(bert, state | {"bert.embeddings.position_ids": torch.arange(40)[None]})
    assert torch.equal(logits(bert), want)
    report = minift.load(bert, task="classify")[0].report
    assert not report.unused and not report.fresh


def test_causal_mask_buffers(gpt2):
    want = logits(gpt2, "complete")
    extra = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(2)}
    rewrite(gpt2, weights_in(gpt2) | extra | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    assert torch.equal(logits(gpt2, "complete"), want)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old pickle"])
def test_pytorch_model_bin(bert, old):
    want, state = logits(bert), weights_in(bert)
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    assert torch.equal(logits(bert), want)


def shard(folder, state, stem="model", kind="safetensors"):
    """Writes `state` as three shards; the path of their index, and which file it names for each tensor."""
    names, index = sorted(state), {}
    (folder / "model.safetensors").unlink(missing_ok=True)
    for i in range(3):
        part = {name: state[name].contiguous() for name in names[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
        index |= dict.fromkeys(part, file)
    path = write(folder / f"{stem}.{kind}.index.json", {"metadata": {"total_size": 1.0}, "weight_map": index})
    return path, index


@pytest.mark.parametrize("stem, kind", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards(bert, stem, kind):
    want = logits(bert)
    shard(bert, weights_in(bert), stem, kind)
    assert torch.equal(logits(bert), want)


@pytest.mark.slow
def test_transformers_own_shards(gpt2, tmp_path):
    GPT2LMHeadModel.from_pretrained(gpt2).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "many", "complete"), logits(gpt2, "complete"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(bert, dtype):
    rewrite(bert, {k: v.to(dtype) for k, v in weights_in(bert).items()})
    model, _ = minift.load(bert, task="classify")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.out.weight, weights_in(bert)["classifier.weight"].float())


def test_a_pretraining_checkpoint(tmp_path):
    """As bert-base-uncased is on the hub: pooler taken, pretraining heads named and left, label head fresh."""
    theirs = peer(transformers.BertForPreTraining, tmp_path)
    model, _ = minift.load(tmp_path, task="classify", labels=["no", "yes", "maybe"])
    assert model.report.fresh == ["classifier.weight", "classifier.bias"]
    assert "cls.seq_relationship.weight" in model.report.unused and model.labels == ["no", "yes", "maybe"]
    assert torch.equal(model.head.pooler.weight, theirs.bert.pooler.dense.weight)
    assert model.head.out.bias.abs().sum() == 0 and 0.01 < model.head.out.weight.std() < 0.03
    assert "classifier.weight" in str(model.report)


def test_another_number_of_labels(bert):
    model, _ = minift.load(bert, task="classify", labels=["a", "b"])
    assert model.report.reshaped == ["classifier.bias", "classifier.weight"] and model.head.out.weight.shape == (2, 32)


def test_a_fresh_head_is_the_peers(tmp_path):
    """The same seed draws the head that transformers draws after set_seed."""
    for cls, full in (
        (BertModel, BertForSequenceClassification),
        (transformers.GPT2Model, transformers.GPT2ForSequenceClassification),
    ):
        folder = tmp_path / cls.__name__
        peer(cls, folder)
        transformers.set_seed(7)
        theirs = full.from_pretrained(folder, num_labels=5)
        model, _ = minift.load(folder, task="classify", labels=list("abcde"), seed=7)
        name = "classifier.weight" if cls is BertModel else "score.weight"
        assert torch.equal(model.head.out.weight, dict(theirs.named_parameters())[name])


def test_tied_and_untied_heads(gpt2, tmp_path):
    model, _ = minift.load(gpt2, task="complete")
    assert model.head.out.weight is model.body.wte.weight
    peer(GPT2LMHeadModel, tmp_path / "untied", tie_word_embeddings=False)
    model, _ = minift.load(tmp_path / "untied", task="complete")
    assert model.head.out.weight is not model.body.wte.weight


def test_a_tied_head_that_is_in_the_file_too(gpt2):
    """Old files hold it twice."""
    want = logits(gpt2, "complete")
    rewrite(gpt2, weights_in(gpt2) | {"lm_head.weight": weights_in(gpt2)["transformer.wte.weight"]})
    assert torch.equal(logits(gpt2, "complete"), want)


@pytest.mark.parametrize("cls, task", [
    (BertForSequenceClassification, "classify"),
    (GPT2LMHeadModel, "complete"),
    (transformers.GPT2ForSequenceClassification, "classify"),
    (BertModel, None),
    (transformers.GPT2Model, None),
])  # fmt: skip
def test_transformers_loads_what_we_save(cls, task, tmp_path):
    theirs = peer(cls, tmp_path / "theirs")
    model, _ = minift.load(tmp_path / "theirs", task=task)
    minift.save(model, None, tmp_path / "ours")
    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    # BertModel has a pooler of its own, which no task of ours without a head has
    missing = {k for k in info["missing_keys"] if "pooler" not in k}
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, p in theirs.named_parameters():
        if task or "pooler" not in name:
            assert torch.equal(dict(again.named_parameters())[name], p), name
    ids = torch.tensor([random_ids([9])[0]])
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids)[0], theirs(ids)[0])
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [cls.__name__]


def test_labels_are_saved(bert, tmp_path):
    model, _ = minift.load(bert, task="classify", labels=["bad", "so-so", "good"])
    minift.save(model, None, tmp_path / "ours")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert minift.load(tmp_path / "ours", task="classify")[0].labels == ["bad", "so-so", "good"]


def test_saving_replaces_an_older_model_of_minifts_and_nothing_else(bert, tmp_path):
    model, _ = minift.load(bert, task="classify")
    out = tmp_path / "out"
    minift.save(model, None, out)
    (out / "notes.md").write_text("mine")
    (out / "onnx").mkdir()
    with torch.no_grad():
        model.head.out.weight.zero_()
    minift.save(model, None, out)
    assert names_in(out) == ["config.json", "minift.json", "model.safetensors", "notes.md", "onnx"]
    assert (out / "notes.md").read_text() == "mine"
    assert not minift.load(out, task="classify")[0].head.out.weight.any()
    assert names_in(tmp_path) == ["bert", "out"]


def test_saving_replaces_nothing_that_minift_did_not_write(bert, tmp_path):
    """A model of transformers', a file changed since, a folder of other things, a file."""
    model, _ = minift.load(bert, task="classify")

    def refuses(out, *words):
        refused(partial(minift.save, model, None), out, *words)

    before = (bert / "config.json").read_bytes()
    refuses(bert, "holds files that minift did not write")
    assert (bert / "config.json").read_bytes() == before
    (tmp_path / "thesis").mkdir()
    chapter = put(tmp_path / "thesis/chapter.tex", "x")
    refuses(tmp_path / "thesis", "chapter.tex", "new or empty folder")
    refuses(chapter, "is a file")
    minift.save(model, None, tmp_path / "out")
    config = put(tmp_path / "out/config.json", "{}")
    refuses(tmp_path / "out", "config.json would be replaced")
    assert chapter.read_text() == "x" and config.read_text() == "{}"


def test_a_loaded_model_does_not_hang_on_its_file(bert):
    model, _ = minift.load(bert, task="classify")
    batch = pack([sequence(0, [5, 6, 7], rows=[0])])
    want = model.logits(batch)
    (bert / "model.safetensors").write_bytes(b"gone")
    assert torch.equal(model.logits(batch), want)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_result_and_one_tensor(tmp_path):
    """The largest resident size, mapped pages of the file counted: 51 MB of weights, the largest tensor 12.6 MB."""
    large = dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    peer(BertModel, tmp_path, vocab_size=99, **large)
    code = """
import sys, minift
def memory(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
minift.load(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted anew
before = memory("VmRSS")
model, _ = minift.load(sys.argv[1])
print(memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""
    small = tmp_path / "small"
    peer(BertModel, small)
    taken, size = map(float, python(code, tmp_path, small).split())
    assert 45 < size < 55 and size * 0.9 < taken < size + 13, (taken, size)


@pytest.mark.slow
def test_only_a_files_memory_is_given_back(tmp_path):
    save_file({"a": torch.arange(1 << 16, dtype=torch.float32)}, tmp_path / "x.safetensors")
    tensors = weights.safetensors_in(tmp_path / "x.safetensors")
    _, _, read = next(tensors)
    for tensor, is_file in ((torch.ones(1 << 16), False), (read(), True)):
        want, place = tensor.clone(), memory.mapping(tensor)
        memory.forget(tensor, place)
        assert torch.equal(tensor, want) and bool(place) == (is_file and sys.platform == "linux")


# faults


def test_missing_tensor(bert):
    state = weights_in(bert)
    del state["bert.encoder.layer.1.attention.self.key.bias"]
    rewrite(bert, state)
    refuse(bert, bert, "bert.encoder.layer.1.attention.self.key.bias is missing")


def test_extra_tensor(bert):
    name = "bert.encoder.layer.2.output.dense.bias"
    rewrite(bert, weights_in(bert) | {name: torch.zeros(32), "bert.surprise": torch.zeros(3)})
    refuse(bert, f"{name} (32,)", "bert.surprise (3,) is in the file, but not in the model")


def test_wrong_shape(bert, gpt2):
    rewrite(bert, weights_in(bert) | {"bert.embeddings.word_embeddings.weight": torch.zeros(98, 32)})
    refuse(bert, "bert.embeddings.word_embeddings.weight is (98, 32)", "expected (99, 32)")
    rewrite(gpt2, weights_in(gpt2) | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)})  # not transposed
    refuse(gpt2, "c_fc.weight is (128, 32)", "expected (32, 128)", task="complete")


def test_a_tensor_under_two_names(bert):
    state = weights_in(bert)
    rewrite(bert, state | {"embeddings.word_embeddings.weight": state["bert.embeddings.word_embeddings.weight"] + 1})
    refuse(bert, "embeddings.word_embeddings.weight is in the file twice")


def test_integer_weights(bert):
    state = weights_in(bert)
    rewrite(bert, state | {"classifier.weight": torch.zeros(3, 32, dtype=torch.int8)})
    refuse(bert, "classifier.weight is torch.int8")


def test_truncated_file(bert):
    path = bert / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(bert, path, "not a whole safetensors file", f"{path.stat().st_size:,} bytes")


def test_header_longer_than_the_file(bert):
    path = bert / "model.safetensors"
    path.write_bytes((10**6).to_bytes(8, "little") + path.read_bytes()[8:5000])
    refuse(bert, path, "not a whole safetensors file")


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{]"])
def test_nonsense_files(bert, content):
    (bert / "model.safetensors").write_bytes(content)
    refuse(bert, "model.safetensors", "not a whole safetensors file")


def test_truncated_bin(bert):
    state = weights_in(bert)
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    whole = (bert / "pytorch_model.bin").read_bytes()
    for part in (whole[:-2000], whole[:1], b""):
        (bert / "pytorch_model.bin").write_bytes(part)
        refuse(bert, "pytorch_model.bin", "not whole")


class Evil:
    """Unpickled, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code(bert, tmp_path, zipped):
    (bert / "model.safetensors").unlink()
    path = bert / "pytorch_model.bin"
    if zipped:
        torch.save({"a": Evil(tmp_path / "ran")}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Evil(tmp_path / "ran")}))
    refuse(bert, path)
    assert not (tmp_path / "ran").exists()


def test_a_bin_of_something_else(bert):
    (bert / "model.safetensors").unlink()
    torch.save({"a": {"a": torch.zeros(2)}}, bert / "pytorch_model.bin")
    refuse(bert, "pytorch_model.bin", "'a' is of type dict; expected named tensors")


def test_no_config(bert):
    (bert / "config.json").unlink()
    refuse(bert, bert, "no config.json")


@pytest.mark.slow
@pytest.mark.parametrize("text, words", [
    ("{", ["not JSON"]),
    ("[1]", ["model_type is 'list'"]),
    ('{"model_type": "llama"}', ["'llama'", "bert, gpt2"]),
    ("{}", ["None", "bert, gpt2"]),
])  # fmt: skip
def test_bad_config(bert, text, words):
    put(bert / "config.json", text)
    refuse(bert, "config.json", *words)


UNKNOWN = dict(position_embedding_type="relative_key", is_decoder=True, hidden_act="mish", num_attention_heads=5)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_bert_we_do_not_compute(bert, name):
    configure(bert, **{name: UNKNOWN[name]})
    refuse(bert, "config.json", name)


def test_no_weights(bert):
    (bert / "model.safetensors").unlink()
    refuse(bert, bert, "no weights", "model.safetensors")


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "model.pkl", 3])
def test_an_index_that_points_outside(bert, place):
    path, index = shard(bert, weights_in(bert))
    index["classifier.bias"] = place
    write(path, {"weight_map": index})
    refuse(bert, path.name, "classifier.bias", place, "same folder")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_bad_index(bert, text):
    path, _ = shard(bert, weights_in(bert))
    path.write_text(text)
    refuse(bert, path.name, "not an index of shards")


def test_a_shard_that_is_not_there(bert):
    path, index = shard(bert, weights_in(bert))
    (bert / index["classifier.bias"]).unlink()
    refuse(bert, index["classifier.bias"], "not there")


def test_shards_that_differ_from_their_index(bert):
    path, index = shard(bert, weights_in(bert))
    file = bert / index["classifier.bias"]
    held = load_file(file)
    save_file({k: v for k, v in held.items() if k != "classifier.bias"}, file)
    refuse(bert, file.name, "classifier.bias")
    save_file(held | {"extra": torch.zeros(1)}, file)
    refuse(bert, file.name, "extra")


def test_no_such_folder():
    for source in ("./nowhere", "/nowhere/at/all", "a/b/c"):
        refuse(source, source, "no such folder")


def test_no_trained_head(tmp_path):
    peer(BertModel, tmp_path)
    refuse(tmp_path, "classifier.weight", "expected a trained head", fresh_head=False)


def test_no_head_for_the_task(tmp_path):
    peer(BertModel, tmp_path)
    refuse(tmp_path, "no head for complete", task="complete")


def test_a_tokenizer_larger_than_the_embedding(bert, assets):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / "weights/tokenizers/bert-base-uncased" / name, bert)
    refuse(bert, "ids up to 30521", "below 99")


def test_many_faults_are_told_at_once_but_not_all(bert):
    rewrite(bert, {f"bert.x{i}": torch.zeros(1) for i in range(30)})
    refuse(bert, "bert.x0 (1,)", "more")


def test_run_folders(bert, tmp_path):
    """best/ before last/; a folder that is neither is taken as it is."""
    run = tmp_path / "run"
    shutil.copytree(bert, run / "last")
    assert hub.resolve(run) == run / "last"
    shutil.copytree(bert, run / "best")
    assert hub.resolve(run) == run / "best" and hub.resolve(bert) == bert


def test_a_full_disk_leaves_the_older_model(bert, tmp_path):
    """No file may grow beyond 10 kB: saving fails, and what was there is still there."""
    model, _ = minift.load(bert, task="classify")
    minift.save(model, None, tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").read_bytes()
    with no_file_beyond(10_000), pytest.raises(OSError, match="could not be written"):
        minift.save(model, None, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert names_in(tmp_path) == ["bert", "out"]
