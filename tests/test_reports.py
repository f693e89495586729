"""Circumstances of public bug reports, tried here: each loads as its peer does, or is refused in words that help.

python -m pytest tests/test_reports.py
"""

import shutil

import peft
import pytest
import torch
import transformers
from folders import configure, refuse, refused, rewrite, weights_in, write
from helpers import IDS, VOCABULARY, logits, peer, peer_logits, sequence
from safetensors.torch import load_file, save_file, save_model
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import minift
from minift.checkpoints import peft as peft_format
from minift.data import tokenizer
from minift.data.batch import pack
from minift.data.passages import Passage
from minift.tasks import complete

pytestmark = pytest.mark.slow


@pytest.fixture
def bert(bert):
    """The BERT classifier with a vocab.txt."""
    write(bert / "vocab.txt", *VOCABULARY)
    return bert


def check_same(folder, theirs):
    """The folder is a language model that says what theirs does."""
    assert torch.allclose(logits(folder, "complete"), peer_logits(theirs.eval()), atol=1e-5)


# weights


@pytest.mark.parametrize("first", ["transformer.wte.weight", "lm_head.weight"])
def test_tied_weights_saved_once(gpt2, first):
    """huggingface/transformers 38870, 41038; keras-team/keras-hub 3075: save_model keeps one name of the two."""
    theirs = GPT2LMHeadModel.from_pretrained(gpt2)
    save_model(theirs, gpt2 / "model.safetensors")
    state = weights_in(gpt2)
    assert "lm_head.weight" in state and "transformer.wte.weight" not in state
    state[first] = state.pop("lm_head.weight")
    rewrite(gpt2, state)
    check_same(gpt2, theirs)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_a_pointer_of_git_lfs(bert, name):
    """huggingface/transformers 27923; microsoft/OmniParser 34; turboderp/exllama 242: "HeaderTooLarge"."""
    (bert / "model.safetensors").unlink()
    (bert / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 437955512\n")
    if name.startswith("adapter"):
        peer(BertModel, bert / "base")
        config = dict(peft_type="LORA", task_type="SEQ_CLS", base_model_name_or_path=str(bert / "base"))
        configure(bert / "adapter_config.json", **config, target_modules=["query"])
    refuse(bert, name, "a pointer of git-lfs, and not the file; expected the file (`git lfs pull`)")


def test_position_ids_in_an_old_file(bert):
    """huggingface/transformers 6044."""
    state = weights_in(bert) | {"bert.embeddings.position_ids": torch.arange(40)[None]}
    rewrite(bert, state)
    assert not minift.load(bert, task="classify")[0].report.unused


def test_a_body_without_its_prefix_and_with_it(bert):
    """huggingface/transformers 217: all weights missing, drawn at random."""
    theirs = BertModel.from_pretrained(bert)
    model, _ = minift.load(bert)
    assert torch.equal(model.body.embeddings.word.weight, theirs.embeddings.word_embeddings.weight)
    state = {"x." + k: v for k, v in weights_in(bert).items()}
    rewrite(bert, state)
    refuse(bert, "x.bert.embeddings.word_embeddings.weight (99, 32) is in the file, but not in the model")


@pytest.mark.parametrize("kind", ["fp4", "gptq", "compressed-tensors"])
def test_other_bits(bert, kind):
    """bitsandbytes-foundation/bitsandbytes 753; ml-explore/mlx-lm 1865: FP8 read as four bits."""
    configure(bert, quantization_config={
        "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "gptq": {"quant_method": "gptq", "bits": 8},
        "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    }[kind])  # fmt: skip
    refuse(bert, "quantization_config is", "expected bitsandbytes' nf4 or load_in_8bit, or none")


# folders


@pytest.mark.parametrize("names", [["checkpoint-5"], ["checkpoint-5", "checkpoint-10"]])
def test_the_folder_around_the_checkpoints(bert, tmp_path, names):
    """OptimalScale/LMFlow 104; foundation-model-stack/fms-hf-tuning 330; artidoro/qlora 175."""
    for name in names:
        shutil.copytree(bert, tmp_path / "out" / name)
    refuse(tmp_path / "out", "no config.json", "checkpoint-5", "in it ha")


def test_a_folder_of_sentence_transformers(bert, tmp_path):
    """huggingface/sentence-transformers: until version 2 the model is in 0_Transformer."""
    shutil.copytree(bert, tmp_path / "st/0_Transformer")
    (tmp_path / "st/modules.json").write_text("[]")
    want = minift.load(bert, task="classify")[0].head.out.weight
    assert torch.equal(minift.load(tmp_path / "st", task="classify")[0].head.out.weight, want)


def test_a_path_of_windows(bert, tmp_path):
    """kijai/ComfyUI-KJNodes 82; lm-sys/FastChat 265: taken for a hub id, "Repo id must use alphanumeric chars"."""
    model, _ = minift.load(bert, task="classify")
    minift.add_lora(model)
    minift.save(model, None, tmp_path / "a")
    configure(tmp_path / "a/adapter_config.json", base_model_name_or_path="C:\\models\\bert")
    refuse(tmp_path / "a", "adapter_config.json names C:\\models\\bert: no such folder", "--base-model FOLDER")
    assert minift.load(tmp_path / "a", base_model=bert)[0].adapter


# heads and labels


def test_a_cross_encoder(tmp_path):
    """huggingface/sentence-transformers 704, 1004: one output is a score."""
    peer(BertForSequenceClassification, tmp_path, num_labels=1)
    refuse(tmp_path, "its head has one output (num_labels 1), a number and no label")


# tokenizers


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer.json"])
def test_truncation_side(bert, place):
    """huggingface/autotrain-advanced 476; huggingface/tokenizers 779; allenai/reward-bench 35."""
    transformers.BertTokenizer.from_pretrained(bert).save_pretrained(bert)
    if place == "tokenizer.json":
        cut = {"direction": "Left", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
        configure(bert / place, truncation=cut)
    else:
        configure(bert / place, truncation_side="left")
    ours, theirs = tokenizer.read_tokenizer(bert), transformers.AutoTokenizer.from_pretrained(bert)
    text, pair = "the film was good and not dull", "a plot of bad acting is poor"
    for n in range(3, 16):
        limit = dict(truncation=True, max_length=n, return_token_type_ids=True)
        for texts, pairs in (([text], None), ([text], [pair]), (["good"], [pair])):
            want = theirs(texts, pairs, **limit)
            (found,) = ours.encode(texts, pairs, n)
            assert (found.ids, found.types) == (want["input_ids"][0], want["token_type_ids"][0])
    configure(bert / "tokenizer_config.json", truncation_side="middle")
    refused(tokenizer.read_tokenizer, bert, "truncation_side is middle; expected left or right")


def test_empty_lines_inside_a_vocabulary(bert):
    """WorksApplications/SudachiTra 64; pytorch/text 1840; huggingface/transformers 1078: ids shift by one."""
    write(bert / "vocab.txt", *VOCABULARY[:8], "", "", *VOCABULARY[8:])
    ours, theirs = tokenizer.read_tokenizer(bert), transformers.AutoTokenizer.from_pretrained(bert)
    assert [t.ids for t in ours.encode(["the film was good"])] == theirs(["the film was good"])["input_ids"]
    assert ours.id("good") == VOCABULARY.index("good") + 2


def test_a_vocabulary_padded_to_a_multiple(bert):
    """NVIDIA/DeepLearningExamples 1275; QwenLM/Qwen-Audio 27: more rows than tokens."""
    model, ours = minift.load(bert, task="classify")
    assert ours.vocab_size == len(VOCABULARY) < model.config.vocab_size


def test_a_token_that_has_no_row(bert):
    """huggingface/transformers 9542, 11102; mickeysjm/R-BERT 5: IndexError: index out of range in self."""
    write(bert / "vocab.txt", *VOCABULARY, *(f"w{i}" for i in range(99 - len(VOCABULARY))))
    assert minift.load(bert, task="classify")
    configure(bert / "added_tokens.json", **{"<new>": 99})
    refuse(bert, "the tokenizer has ids up to 99; expected below 99, the rows of the model's embedding")


def test_an_end_that_the_data_wrote_already(tmp_path):
    """ml-explore/mlx-examples 900; axolotl-ai-cloud/axolotl 1847: learned twice."""
    write(tmp_path / "merges.txt", "#version: 0.2")
    write(tmp_path / "vocab.json", {"a": 0, "b": 1, "<|endoftext|>": 2})
    ours = tokenizer.read_tokenizer(tmp_path)
    (s,) = complete.encode([Passage((("a", False), ("b<|endoftext|>", True)), "")], None, ours, 9)
    assert s.ids.tolist() == [0, 1, 2]


# adapters


@pytest.fixture
def adapted(gpt2, tmp_path):
    """(folder of a PEFT adapter, the PEFT model)."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False)
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(gpt2), config)
    theirs.save_pretrained(tmp_path / "a")
    configure(tmp_path / "a/adapter_config.json", base_model_name_or_path=str(gpt2))
    return tmp_path / "a", theirs


@pytest.mark.parametrize("name", ["default", "default_0", "thickline_fp16", "policy"])
def test_the_adapters_own_name_in_its_file(adapted, name):
    """huggingface/diffusers 9622, 7669: `lora_A.default_0.weight` was passed over."""
    folder, theirs = adapted
    state = load_file(folder / peft_format.WEIGHTS)
    save_file({k.replace(".weight", f".{name}.weight"): v for k, v in state.items()}, folder / peft_format.WEIGHTS)
    check_same(folder, theirs)


def test_an_adapter_that_lands_nowhere(adapted):
    """vllm-project/vllm 34186, 39278; ace-step/ACE-Step-1.5 615: answers of the base, without a word."""
    folder, _ = adapted
    path = folder / peft_format.WEIGHTS
    save_file({k.replace("transformer.h", "language_model.h"): v for k, v in load_file(path).items()}, path)
    refuse(folder, "lora_A.weight is missing", task="complete")


def test_an_adapter_of_zero_3(adapted):
    """huggingface/peft 1710, 1328, 460; OpenRLHF/OpenRLHF 651: shards that were not gathered are empty."""
    folder, _ = adapted
    state = load_file(folder / peft_format.WEIGHTS)
    save_file({k: v if "lora_A" in k else v.new_empty(0) for k, v in state.items()}, folder / peft_format.WEIGHTS)
    refuse(folder, "lora_B.weight is (0,); expected (96, 2)", task="complete")


@pytest.mark.parametrize("rows", [96, 99, 105])
def test_an_adapter_with_fewer_rows_or_more(gpt2, tmp_path, rows):
    """huggingface/peft 2415; hiyouga/LlamaFactory 8046, 3154; unslothai/unsloth 377."""
    base = GPT2LMHeadModel.from_pretrained(gpt2)
    base.resize_token_embeddings(rows, mean_resizing=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    configure(tmp_path / "a/adapter_config.json", base_model_name_or_path=str(gpt2))
    ids = [i % 90 for i in IDS[1]]
    model, _ = minift.load(tmp_path / "a", task="complete")
    with torch.no_grad():
        assert torch.allclose(model.logits(pack([sequence(0, ids)])), peer_logits(theirs.eval(), [ids]), atol=1e-5)
    assert model.settings["vocab_size"] == rows == model.config.vocab_size


@pytest.mark.parametrize("kind", ["XLORA", "VERA", "PROMPT_TUNING", None])
def test_other_kinds_of_adapters(adapted, kind):
    """huggingface/peft 2132."""
    configure(adapted[0] / "adapter_config.json", peft_type=kind)
    refuse(adapted[0], f"peft_type is {kind!r}; expected 'LORA' or 'IA3'", task="complete")
