"""Checkpoints and adapters as they are found: what transformers and PEFT make of them is made of them here, or refused.

python -m pytest tests/test_odd_models.py
"""

import shutil

import peft
import pytest
import torch
import transformers
from folders import configure, refuse, rewrite, weights_in, write
from helpers import fails, logits, peer, peer_logits, sequence, small_bert, works
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import minift
from minift.checkpoints import hub, loading
from minift.checkpoints import peft as peft_format
from minift.data.batch import pack

pytestmark = pytest.mark.slow


def theirs(model):
    return peer_logits(model.eval())


# labels and heads


@pytest.mark.parametrize("by_id, want", [
    ({"0": 0, "1": 1, "2": 2}, ["0", "1", "2"]),
    ({"2": "c", "0": "a", "1": "b"}, ["a", "b", "c"]),
    (None, ["LABEL_0", "LABEL_1"]),
    ({}, ["LABEL_0", "LABEL_1"]),
    ({"negative": 0, "positive": 1}, "id2label is .*; expected an object from each number to its name"),
    (["a", "b"], "id2label is \\['a', 'b'\\]; expected an object"),
    ("ab", "id2label is 'ab'"),
    (3, "id2label is 3"),
    ({"0": "a", "2": "b"}, "id2label has 2 names, but none for 1"),
    ({"1": "a", "2": "b"}, "id2label has 2 names, but none for 0"),
    ({"0": None, "1": "b"}, "id2label has None as a name"),
    ({"0": ["a"], "1": "b"}, "id2label has \\['a'\\] as a name"),
    ({"0": "a", "1": "a"}, "id2label has the name 'a' twice"),
    ({"0": "a", "-1": "b"}, "id2label is"),
    ({"0": "a", "1.0": "b"}, "id2label is"),
    ({"0": "a", "9" * 5000: "b"}, "id2label is"),
])  # fmt: skip
def test_id2label(bert, by_id, want):
    configure(bert, id2label=by_id)
    if isinstance(want, list):
        assert loading.label_names(hub.read_settings(bert), bert) == want
    else:
        with pytest.raises(minift.InputError, match=want):
            minift.load(bert, task="classify")


def test_the_number_of_labels_alone(bert):
    """As old files have it."""
    want = logits(bert)
    configure(bert, id2label=..., label2id=..., num_labels=3)
    assert transformers.AutoConfig.from_pretrained(bert).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert minift.load(bert, task="classify")[0].labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert torch.equal(logits(bert), want)
    for wrong in (-1, "3", 2.5, 10**9):
        configure(bert, num_labels=wrong)
        refuse(bert, f"num_labels is {wrong!r}")


def test_one_output_is_no_label(tmp_path):
    peer(BertForSequenceClassification, tmp_path, num_labels=1)
    refuse(tmp_path, "config.json: its head has one output (num_labels 1)")
    assert minift.load(tmp_path, task="classify", labels=["a", "b"])[0].report.reshaped  # a new task is another matter


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_heads_of_other_kinds(bert, kind):
    configure(bert, problem_type=kind)
    refuse(bert, f"problem_type is '{kind}', whose head is not supported")
    refuse(bert, f"problem_type is '{kind}'", labels=["x", "y", "z"])  # the same rows would be trained further
    assert minift.load(bert, task="classify", labels=["a", "b"])[0].report.reshaped


# two heads


def test_another_head_than_the_embedding(gpt2, tmp_path):
    state = weights_in(gpt2)
    other = torch.randn(99, 32)
    rewrite(gpt2, state | {"lm_head.weight": other})
    want = theirs(GPT2LMHeadModel.from_pretrained(gpt2))
    model, _ = minift.load(gpt2, task="complete")
    assert "lm_head.weight is not the word embedding" in str(model.report) and not model.report.unused
    assert torch.allclose(logits(gpt2, "complete"), want, atol=1e-5)
    minift.save(model, None, tmp_path / "saved")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert torch.allclose(theirs(again), want, atol=1e-5)
    assert torch.equal(again.lm_head.weight, other) and not torch.equal(again.transformer.wte.weight, other)


def test_the_same_head_twice_stays_tied(gpt2):
    state = {k: v.half() for k, v in weights_in(gpt2).items()}
    rewrite(gpt2, state | {"lm_head.weight": state["transformer.wte.weight"]})
    model, _ = minift.load(gpt2, task="complete")
    assert model.head.out.weight is model.body.wte.weight and not model.report.notes and not model.report.unused


def test_a_second_head_of_another_shape(gpt2):
    rewrite(gpt2, weights_in(gpt2) | {"lm_head.weight": torch.randn(98, 32)})
    refuse(gpt2, "lm_head.weight is (98, 32)", "expected (99, 32)", task="complete")


# numbers that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["classifier.bias", "bert.embeddings.word_embeddings.weight",
                                  "bert.encoder.layer.1.attention.self.key.weight"])  # fmt: skip
def test_not_finite(bert, name, dtype, bad):
    state = {k: v.to(dtype) for k, v in weights_in(bert).items()}
    state[name].view(-1)[-1] = bad
    rewrite(bert, state)
    for base in ("", "nf4"):
        refuse(bert, f"{name} has numbers that are not finite", base=base)


def test_large_numbers_are_finite(bert, gpt2):
    """A sum of them is not."""
    state = weights_in(bert)
    state["bert.embeddings.word_embeddings.weight"][3:60] = 3e38
    rewrite(bert, state)
    assert minift.load(bert, task="classify")[0].body.embeddings.word.weight.max() == torch.tensor(3e38)
    state = weights_in(gpt2)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    state["lm_head.weight"][5, 5] = float("nan")
    rewrite(gpt2, state)
    refuse(gpt2, "lm_head.weight has numbers that are not finite", task="complete")


# names and wrappers


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_what_wrappers_leave_in_front(bert, before):
    want = logits(bert)
    rewrite(bert, {before + k: v for k, v in weights_in(bert).items()})
    model, _ = minift.load(bert, task="classify")
    assert model.report.notes == [f"names in the file begin with {before}, which was taken off"]
    assert torch.equal(logits(bert), want)
    rewrite(bert, {k.replace("bert.", "module."): v for k, v in weights_in(bert).items()})
    assert torch.equal(logits(bert), want)  # around the body alone


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_trainers_checkpoint(bert, key):
    want, state = logits(bert), weights_in(bert)
    (bert / "model.safetensors").unlink()
    torch.save({key: {"module." + k: v for k, v in state.items()}, "epoch": 3}, bert / "pytorch_model.bin")
    model, _ = minift.load(bert, task="classify")
    assert f"begin with {key}.module." in str(model.report) and torch.equal(logits(bert), want)


@pytest.mark.parametrize("change, words", [
    (lambda state: state | {3: torch.zeros(2)}, "3 is of type Tensor; expected named tensors"),
    (lambda state: state | {"a": 3}, "'a' is of type int"),
    (lambda state: state | {"classifier.bias": torch.zeros(3).to_sparse()}, "bias is a tensor sparse_coo"),
    (lambda state: state | {"classifier.bias": torch.zeros(3, device="meta")}, "bias is a tensor without"),
    (lambda state: state | {"classifier.bias": torch.zeros(1).expand(3)}, "classifier.bias is a tensor strided"),
    (lambda state: [*state.values()], "holds a list; expected named tensors"),
    (lambda state: state | {"classifier.bias": torch.zeros(3, dtype=torch.complex64)}, "is torch.complex64"),
])  # fmt: skip
def test_odd_pickles(bert, change, words):
    state = weights_in(bert)
    (bert / "model.safetensors").unlink()
    torch.save(change(state), bert / "pytorch_model.bin")
    refuse(bert, words)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_nesting_of_a_models_files(bert, name):
    if name != "config.json":
        (bert / "model.safetensors").unlink()
    for content in ("[" * 10_000, '{"weight_map": ' * 10_000 + "}" * 10_000):
        (bert / name).write_text(content)
        refuse(bert, name, "nested more than 100 levels deep")


# fields


@pytest.mark.parametrize("wrong", [0, -1, 10**19, float("inf"), float("nan"), 2.5, "32", None, [], True])
@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_size_that_is_none(bert, field, wrong):
    configure(bert, **{field: wrong})
    refuse(bert, f"config.json: {field} is {wrong!r}; expected a whole number from 1 to")


@pytest.mark.parametrize("wrong", [1, 5, -0.1, "x", None, float("nan"), [0.1]])
def test_a_rate_that_is_none(bert, gpt2, wrong):
    configure(bert, hidden_dropout_prob=wrong)
    refuse(bert, f"hidden_dropout_prob is {wrong!r}; expected a rate from 0 to below 1")
    configure(gpt2, resid_pdrop=wrong)
    refuse(gpt2, f"resid_pdrop is {wrong!r}", task="complete")


@pytest.mark.parametrize(
    "field, wrong",
    [("layer_norm_eps", "1e-12"), ("layer_norm_eps", float("nan")), ("initializer_range", -1), ("is_decoder", "false"),
     ("hidden_act", 3), ("architectures", 3), ("minift", [1]), ("minift", {"base": "int3"}), ("model_type", ["bert"]),
     ("minift", {"max_length": "x"}), ("quantization_config", 3), ("num_hidden_layers", 10**9)],
)  # fmt: skip
def test_other_fields(bert, field, wrong):
    configure(bert, **{field: wrong})
    refuse(bert, "config.json", field)


def test_other_names_of_fields(gpt2):
    """GPT-2's config.json may say num_attention_heads for n_head; 12 heads would be computed without a word."""
    want = logits(gpt2, "complete")
    configure(gpt2, n_head=..., num_attention_heads=4, n_layer=..., num_hidden_layers=2)
    assert torch.equal(logits(gpt2, "complete"), want)
    assert torch.allclose(theirs(GPT2LMHeadModel.from_pretrained(gpt2)), want, atol=1e-5)
    configure(gpt2, n_head=2)
    refuse(gpt2, "num_attention_heads is 4, but n_head, its other name, 2", task="complete")


# adapters


def adapter(model, folder, seed=0, **config):
    """A PEFT adapter of `model` with weights drawn anew, saved in `folder`; returns the PEFT model."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | config))
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.3)
    wrapped.save_pretrained(folder)
    return wrapped


def adapted(cls, base, folder):
    """What PEFT makes of an adapter folder on a base."""
    return peft.PeftModel.from_pretrained(cls.from_pretrained(base), folder).eval()


@pytest.mark.parametrize("more", [
    {}, {"use_rslora": True}, {"rank_pattern": {"value": 2}, "alpha_pattern": {"query": 3}}, {"use_dora": True},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["pissa", "olora", "eva", "gaussian", "orthogonal", False])
def test_adapters_of_a_changed_base(bert, tmp_path, kind, more):
    """As PEFT loads them: what was taken out of the base is taken out again."""
    config = dict(task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=kind)
    if kind == "eva":
        config["eva_config"] = peft.EvaConfig()
    adapter(BertForSequenceClassification.from_pretrained(bert), tmp_path / "a", **config, **more)
    want = theirs(adapted(BertForSequenceClassification, bert, tmp_path / "a"))
    configure(tmp_path / "a/adapter_config.json", base_model_name_or_path=str(bert))
    assert torch.allclose(logits(tmp_path / "a"), want, atol=2e-5)
    model, _ = minift.load(tmp_path / "a", task="classify")
    minift.save(model, None, tmp_path / "again")  # as plain LoRA, which needs no changed base
    assert torch.allclose(logits(tmp_path / "again"), want, atol=2e-5)
    again = theirs(adapted(BertForSequenceClassification, bert, tmp_path / "again"))
    assert torch.allclose(again, want, atol=2e-5)


def test_pissa_of_gpt2(gpt2, tmp_path):
    config = dict(task_type="CAUSAL_LM", init_lora_weights="pissa", fan_in_fan_out=True)
    adapter(GPT2LMHeadModel.from_pretrained(gpt2), tmp_path / "a", **config)
    want = theirs(adapted(GPT2LMHeadModel, gpt2, tmp_path / "a"))
    configure(tmp_path / "a/adapter_config.json", base_model_name_or_path=str(gpt2))
    assert torch.allclose(logits(tmp_path / "a", "complete"), want, atol=5e-5)


@pytest.fixture
def lora(bert, tmp_path):
    """A folder with a plain PEFT adapter of `bert`, and its logits."""
    base = BertForSequenceClassification.from_pretrained(bert)
    wrapped = adapter(base, tmp_path / "lora", task_type="SEQ_CLS", target_modules=["query"])
    configure(tmp_path / "lora/adapter_config.json", base_model_name_or_path=str(bert))
    return tmp_path / "lora", theirs(wrapped)


@pytest.mark.parametrize("kind", ["pissa_niter_4", "corda", "loftq", "lora_ga", "something new"])
def test_a_base_that_cannot_be_changed_again(lora, kind):
    configure(lora[0] / "adapter_config.json", init_lora_weights=kind)
    refuse(lora[0], "adapter_config.json", f"init_lora_weights is '{kind}'")


@pytest.mark.parametrize("changes, words", [
    ({"use_xlora": True}, "use_xlora is True, an option that is not known here"),
    ({"xlora_config": {"depth": 1}}, "xlora_config is"),
    ({"shuffled": True}, "shuffled is True"),
    ({"r": "x"}, "adapter_config.json"),
    ({"r": 10**9}, "rank is 1000000000 for bert.encoder.layer.0.attention.self.query, which is 32 x 32"),
    ({"r": float("inf")}, "adapter_config.json"),
    ({"r": None}, "r is 'None'; expected a number"),
    ({"rank_pattern": True}, "rank_pattern is 'True'; expected an object of numbers"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"target_modules": "("}, "targets is '(': not a regular expression"),
    ({"exclude_modules": "[z"}, "exclude is '[z'"),
    ({"rank_pattern": {"[": 2}}, "rank_pattern is '['"),
    ({"rank_pattern": [1]}, "adapter_config.json"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is '3'; expected a string"),
    ({"task_type": ["SEQ_CLS"], "modules_to_save": 3}, "adapter_config.json"),
])  # fmt: skip
def test_odd_adapter_settings(lora, changes, words):
    configure(lora[0] / "adapter_config.json", **changes)
    refuse(lora[0], words)


def test_what_a_newer_peft_says_beside(lora):
    configure(lora[0] / "adapter_config.json", written_by="a newer PEFT", use_xlora=False)
    model, _ = minift.load(lora[0])
    assert "not known here, and not used: written_by" in str(model.report)


def test_an_adapter_as_a_pickle(lora):
    folder, want = lora
    state = load_file(folder / peft_format.WEIGHTS)
    (folder / peft_format.WEIGHTS).unlink()
    refuse(folder, "no adapter; expected adapter_model.safetensors or adapter_model.bin")
    torch.save(state, folder / "adapter_model.bin")
    assert torch.allclose(logits(folder), want, atol=1e-5)
    torch.save(state | {"x": print}, folder / "adapter_model.bin")
    refuse(folder, "adapter_model.bin: not a checkpoint of tensors alone")


@pytest.mark.parametrize("rename", [
    lambda k: k.replace(".weight", ".default.weight") if "lora_" in k else k,
    lambda k: k.replace("classifier.", "classifier.modules_to_save.default."),
    lambda k: "module." + k,
    lambda k: k.removeprefix("base_model.model."),
    lambda k: k.replace("base_model.model.bert.", "base_model.model."),
])  # fmt: skip
def test_other_names_in_an_adapter(lora, rename):
    folder, want = lora
    state = load_file(folder / peft_format.WEIGHTS)
    save_file({rename(k): v for k, v in state.items()}, folder / peft_format.WEIGHTS)
    assert torch.allclose(logits(folder), want, atol=1e-5)


@pytest.mark.parametrize("targets", [["query"], r"encoder\.layer\.0\..*query", "all-linear"])
def test_an_adapter_of_the_bare_body(tmp_path, targets):
    theirs = peer(BertModel, tmp_path / "base")
    adapter(theirs, tmp_path / "a", task_type="FEATURE_EXTRACTION", target_modules=targets)
    configure(tmp_path / "a/adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    if targets == "all-linear":  # it wraps the pooler too, which the body here has not
        return refuse(tmp_path / "a", "pooler", task=None)
    ids = [5, 6, 7, 8]
    with torch.no_grad():
        want = adapted(BertModel, tmp_path / "base", tmp_path / "a")(torch.tensor([ids])).last_hidden_state[0]
        model, _ = minift.load(tmp_path / "a")
        assert torch.allclose(model(pack([sequence(0, ids)])), want, atol=1e-5)
        minift.save(model, None, tmp_path / "ours")  # by the names of the bare body, or PEFT would pass them over
        again = adapted(BertModel, tmp_path / "base", tmp_path / "ours")(torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(again, want, atol=1e-5)
        assert torch.allclose(minift.load(tmp_path / "ours")[0](pack([sequence(0, ids)])), want, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(gpt2, tmp_path, tied):
    """PEFT saves the embedding with the adapter; the base still has the old one."""
    configure(gpt2, tie_word_embeddings=tied)
    if not tied:
        rewrite(gpt2, weights_in(gpt2) | {"lm_head.weight": torch.randn(99, 32)})
    base = GPT2LMHeadModel.from_pretrained(gpt2)
    base.resize_token_embeddings(103, mean_resizing=False)
    wrapped = adapter(base, tmp_path / "a", task_type="CAUSAL_LM", fan_in_fan_out=True)
    want = theirs(wrapped)
    assert "base_model.model.transformer.wte.weight" in load_file(tmp_path / "a" / peft_format.WEIGHTS)
    model, _ = minift.load(tmp_path / "a", base_model=gpt2)
    assert torch.allclose(logits(tmp_path / "a", "complete", base_model=gpt2), want, atol=1e-5)
    minift.save(model, None, tmp_path / "b")
    assert torch.allclose(logits(tmp_path / "b", "complete"), want, atol=1e-5)
    merged, _, _ = minift.merge(minift.MergeConfig(model=str(tmp_path / "b"), out="x"))
    minift.save(merged, None, tmp_path / "merged")
    assert torch.allclose(theirs(GPT2LMHeadModel.from_pretrained(tmp_path / "merged")), want, atol=1e-4)


# where the base is


def test_who_named_a_base_that_is_not_there(lora, tmp_path, bert):
    bert.rename(tmp_path / "moved")
    refuse(lora[0], lora[0] / "adapter_config.json", f"names {bert}: no such folder", "--base-model FOLDER")
    assert torch.allclose(logits(lora[0], base_model=tmp_path / "moved"), lora[1], atol=1e-5)
    refuse(lora[0], "nowhere: no such folder", base_model=str(tmp_path / "nowhere"))
    refuse(tmp_path / "moved", "is no adapter", base_model=tmp_path / "moved")
    configure(lora[0] / "adapter_config.json", base_model_name_or_path=None)
    refuse(lora[0], "no base_model_name_or_path; expected the model to adapt (or --base-model FOLDER)")


def test_a_base_that_moved_along(tmp_path):
    """PiSSA's, which a run keeps beside its models: even where another stands at the old place meanwhile."""
    small_bert(tmp_path / "model")
    write(tmp_path / "data.tsv", *[("good film", "praise"), ("bad film", "blame")] * 4)
    line = "train --model {f}/model --data {f}/data.tsv --out {f}/run --steps 1 --method pissa --rank 2"
    works(line, f=tmp_path)
    want = said(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run/base")
    assert said(tmp_path / "moved") == want
    small_bert(tmp_path / "run/base", hidden_act="relu")
    assert said(tmp_path / "moved") == want


def said(folder):
    """What a classifier says of a text."""
    model, tokenizer = minift.load(folder, task="classify")
    return list(minift.predict(model, tokenizer, minift.PredictConfig(text="good film")))


def test_a_model_and_an_adapter_in_one_folder(lora, bert, tmp_path):
    folder, want = lora
    both = tmp_path / "both"
    shutil.copytree(bert, both)
    for file in ("adapter_config.json", peft_format.WEIGHTS):
        shutil.copy(folder / file, both)
    for named in (str(both), None, "/gone/away"):
        configure(both / "adapter_config.json", base_model_name_or_path=named)
        assert torch.allclose(logits(both), want, atol=1e-5)
    assert "/gone/away" in str(minift.load(both)[0].report)
    state = weights_in(both)  # now the one in the folder is another than the one that is named
    state["bert.embeddings.word_embeddings.weight"] += 1
    rewrite(both, state)
    configure(both / "adapter_config.json", base_model_name_or_path=str(bert))
    assert torch.allclose(logits(both), want, atol=1e-5)
    assert "the model beside the adapter is not used" in str(minift.load(both)[0].report)
    (both / peft_format.WEIGHTS).unlink()  # a merged model in the folder of its adapter
    model, _ = minift.load(both, task="classify")
    assert model.adapter is None and "without an adapter; its own model is used" in str(model.report)


def test_an_adapter_of_an_adapter(lora, tmp_path):
    shutil.copytree(lora[0], tmp_path / "second")
    configure(tmp_path / "second/adapter_config.json", base_model_name_or_path=str(lora[0]))
    refuse(tmp_path / "second", "is an adapter itself; expected a model (merge that one first)")


# four bits in wider numbers


@pytest.mark.usefixtures("exact_bitsandbytes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
def test_quant_storage(tmp_path, dtype):
    peer(BertForSequenceClassification, tmp_path / "base", num_labels=3, hidden_size=64, intermediate_size=64)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=getattr(torch, dtype),
        bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["classifier", "pooler"],
    )  # fmt: skip
    kinds = dict(quantization_config=config, dtype=torch.float32)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", **kinds)
    want = theirs(model)
    model.save_pretrained(tmp_path / "packed")
    assert torch.allclose(logits(tmp_path / "packed"), want, atol=1e-5)


# what the options of an adapter may say


@pytest.mark.parametrize("options, words", [
    ("--method lora --targets (", "targets is '(': not a regular expression"),
    ("--method lora --exclude (", "exclude is '('"),
    ("--method lora --rank-pattern [=2", "rank_pattern is '['"),
    ("--method lora --alpha-pattern *=2", "alpha_pattern is '*'"),
    ("--method lora --rank 1000000000", "rank is 1000000000 for"),
    ("--method pissa --rank 33", "rank is 33 for bert.encoder.layer.0.attention.self.query"),
    ("--method loftq --base nf4 --rank 33", "rank is 33 for bert.encoder.layer.0.attention.self.query"),
    ("--method pissa --alpha 0", "alpha is 0.0 for"),
    ("--method loftq --base nf4 --alpha 0", "alpha is 0.0 for"),
])  # fmt: skip
def test_adapter_options(tmp_path, options, words):
    small_bert(tmp_path / "model")
    write(tmp_path / "data.tsv", ("good film", "praise"), ("bad film", "blame"))
    fails(f"train --model {{f}}/model --data {{f}}/data.tsv --out {{f}}/run {options}", words, f=tmp_path)
    assert not (tmp_path / "run").exists()
