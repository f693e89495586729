"""Hostile input, drawn at random: each loads and works, or is refused by InputError; within 5 s and 1 GB.

python -m pytest tests/test_hostile.py

A generator draws one change of a good folder from its seed. To add one (of options, of a checkpoint's state): a
function of (folder, random.Random) that spoils something there, and a line in KINDS that says what must survive it.
"""

import copy
import json
import random
import resource
import shutil
import time

import pytest
import torch
import transformers
from folders import configure, write
from helpers import VOCABULARY, peer, small_gpt2
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import minift

pytestmark = pytest.mark.slow

SECONDS, BYTES = 5, 1 << 30
ODD = [
    0, -1, 1, 2, 5, 7, 10**9, 10**19, 10**400, -(10**19), 0.0, 0.5, 1.0, 1e308, float("inf"), float("nan"),
    True, False, None, "", "x", "32", "0.1", "\ud800", "a" * 10_000,
    [], [1], ["a", "b"], {}, {"a": 1}, {"0": "a", "1": "b"}, [[]] * 3, {"0": None},
]  # fmt: skip


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Folders to be spoiled: a classifier, a language model, an adapter of the classifier."""
    root = tmp_path_factory.mktemp("good")
    peer(BertForSequenceClassification, root / "bert", vocab_size=64, num_labels=2)
    write(root / "bert/vocab.txt", *VOCABULARY)
    transformers.BertTokenizer.from_pretrained(root / "bert").save_pretrained(root / "bert")
    small_gpt2(root / "gpt2", more=["ab"], merges=["a b"], vocab_size=300, n_positions=40)
    model, tokenizer = minift.load(root / "bert", task="classify")
    minift.add_lora(model, rank=2)
    minift.save(model, tokenizer, root / "adapter")
    return root


def use(folder, task):
    """Loads a model and lets it say something."""
    model, tokenizer = minift.load(folder, task=task, fresh_head=False)
    if tokenizer is None:
        return
    if task == "classify":
        list(minift.predict(model, tokenizer, minift.PredictConfig(model="x", text="a good film\u00e9 x", pair="b")))
    else:
        list(minift.generate(model, tokenizer, minift.GenerateConfig(model="x", prompt="ab c", max_tokens=3)))


# what spoils a folder


def change_json(folder, rng, name, keys=()):
    """One to three fields of a JSON file, anywhere in it, become something odd, or go."""
    path = folder / name
    content = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        place = content
        while True:
            fields = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice([*fields, *(keys if place is content else ())] or ["new"])
            inner = place[key] if key in fields else None
            if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
                break
            place = inner
        if rng.random() < 0.15 and key in fields:
            del place[key]
        elif isinstance(place, dict) or key in fields:
            place[key] = copy.deepcopy(rng.choice(ODD))
    path.write_text(json.dumps(content))


def change_bytes(folder, rng, name):
    """A file cut, emptied, with bytes flipped, doubled, or nested without end."""
    path = folder / name
    content = bytearray(path.read_bytes())
    what = rng.choice(["cut", "flip", "flip", "flip", "empty", "twice", "nest", "garbage"])
    if what == "cut":
        content = content[: rng.randrange(len(content))]
    elif what == "flip":
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(min(len(content), rng.choice([64, 2000, len(content)])))
            content[at] = rng.randrange(256)
    elif what == "nest":
        content = b'{"a":' * rng.choice([90, 900, 100_000])
    else:
        content = {"empty": b"", "twice": content * 2, "garbage": rng.randbytes(5000)}[what]
    path.write_bytes(content)


def change_config(folder, rng):
    names = (
        "hidden_size n_embd n_layer n_head num_labels problem_type eos_token_id id2label minift quantization_config"
        " tie_word_embeddings tokenizer_class hidden_dropout_prob type_vocab_size n_inner architectures"
        " num_hidden_layers vocab_size max_position_embeddings"
    ).split()
    change_json(folder, rng, "config.json", names)


def change_labels(folder, rng):
    numbers = ["0", "1", "2", "-1", "x", "00", "1.0", " 1", "\u0661", "9" * 30]
    by_id = {rng.choice(numbers): rng.choice([*ODD, "a", "b"]) for _ in range(rng.randint(0, 4))}
    configure(folder, id2label=rng.choice([by_id, rng.choice(ODD)]))


def change_tokenizer(folder, rng):
    """One part of a tokenizer.json, or a vocab.json where there is none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return (change_bytes if rng.random() < 0.7 else change_json)(folder, rng, "vocab.json")
    parts = ["normalizer", "pre_tokenizer", "post_processor", "added_tokens", "model", "decoder", "vocabulary"]
    part, replacement = rng.choice(parts), odd_replacement(rng)
    content = json.loads(path.read_text())
    if part == "normalizer":
        content[part] = {"type": "Sequence", "normalizers": [replacement] * rng.choice([1, 2, 40])}
    elif part == "vocabulary":
        for _ in range(rng.randint(1, 30)):
            content["model"]["vocab"].pop(rng.choice([*content["model"]["vocab"], "[UNK]"]), None)
    elif part == "post_processor":
        content[part] |= odd_templates(rng)
        content[part]["special_tokens"]["[CLS]"]["ids"] = [rng.choice([2, 63, 64, 10**6, 2**32 - 1])]
    elif content.get(part):
        write(path, {part: content[part]})
        change_json(folder, rng, path.name)
        content |= json.loads(path.read_text())
    write(path, content)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def odd_replacement(rng):
    """A step of a normaliser that makes texts longer, or loops."""
    pattern = rng.choice([{"String": "a"}, {"Regex": "."}, {"Regex": ""}])
    return {"type": "Replace", "pattern": pattern, "content": "a" * rng.choice([0, 1, 2, 3, 1000])}


def odd_templates(rng):
    """What is put around a text and a pair, with types that no model has."""
    pieces = [
        {"Sequence": {"id": rng.choice("AB"), "type_id": rng.choice([0, 1, 5, 200, 2**31])}},
        {"SpecialToken": {"id": rng.choice(["[CLS]", "[SEP]", "x"]), "type_id": rng.choice([0, 5, 200])}},
    ]
    return {kind: [rng.choice(pieces) for _ in range(rng.randint(0, 4))] for kind in ("single", "pair")}


def change_tokenizer_settings(folder, rng):
    path = folder / "tokenizer_config.json"
    if not path.exists():
        path.write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    names = (
        "do_lower_case strip_accents added_tokens_decoder additional_special_tokens eos_token cls_token"
        " extra_special_tokens add_bos_token bos_token tokenizer_class add_prefix_space unk_token"
    ).split()
    change_json(folder, rng, "tokenizer_config.json", names)
    if rng.random() < 0.3:
        (folder / "tokenizer.json").unlink(missing_ok=True)
    if rng.random() < 0.3:
        (folder / "added_tokens.json").write_text(json.dumps(rng.choice([*ODD, {"<x>": rng.choice(ODD)}])))
    if rng.random() < 0.3:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": rng.choice(ODD)}))


def change_tokenizer_bytes(folder, rng):
    names = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt"]
    change_bytes(folder, rng, rng.choice([name for name in names if (folder / name).exists()]))


def odd_tensor(name, tensor, rng):
    """What may stand in a file for one tensor: nothing, another shape, dtype or name, numbers that are none."""
    dtypes = [torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16]
    if tensor.dim() == 0:  # it was spoiled already
        return {}
    name_too = rng.choice(["module.", "x.", "\u0000", ""]) + name + rng.choice(["", ".absmax", ".x"])
    choices = [
        {},
        {name: tensor.t() if tensor.dim() == 2 else tensor[:-1]},
        {name: tensor.to(rng.choice(dtypes))},
        {name: torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 3e38]))},
        {name: tensor[:0]},
        {name: tensor.reshape(-1)},
        {name: torch.tensor(1.0)},
        {name_too: tensor},
        {name: tensor, "lm_head.weight": tensor},
        {name: tensor[None]},
    ]
    return rng.choice(choices)


def change_weights(folder, rng):
    path = folder / ("model.safetensors" if (folder / "model.safetensors").exists() else "adapter_model.safetensors")
    if rng.random() < 0.4:
        return change_bytes(folder, rng, path.name)
    state = load_file(path)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*state] or ["x"])
        tensor = state.pop(name, torch.zeros(2, 2))
        state |= odd_tensor(name, tensor, rng)
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if path.name == "model.safetensors" and rng.random() < 0.5:
        path.unlink()
        odd = [3, "x", None, [1], torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), torch.zeros(1).expand(10**9)]
        if rng.random() < 0.5:
            state[rng.choice([*state, 3, (1, 2), None, b"x"])] = rng.choice(odd)
        torch.save(rng.choice([state, {"state_dict": state}, [state]]), folder / "pytorch_model.bin")
    else:
        save_file(state, path)


def change_index(folder, rng):
    names = [*load_file(folder / "model.safetensors")]
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    odd = ["../x.safetensors", "/dev/zero", "gone.safetensors", "config.json", 3, None, {}]
    places = ["model-1.safetensors"] * 9 + odd
    index = {"weight_map": {name: "model-1.safetensors" for name in names}}
    index["weight_map"][rng.choice([*names, "x"])] = rng.choice(places)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if rng.random() < 0.5:
        change_bytes(folder, rng, "model.safetensors.index.json")


def change_adapter_settings(folder, rng):
    names = (
        "r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform rank_pattern alpha_pattern"
        " modules_to_save init_lora_weights use_dora use_x x_config task_type"
    ).split()
    change_json(folder, rng, "adapter_config.json", names)


def change_adapter_bytes(folder, rng):
    change_bytes(folder, rng, "adapter_config.json")


BERT, GPT2, ADAPTER = ("bert", "classify"), ("gpt2", "complete"), ("adapter", "classify")
KINDS = {  # what is spoiled -> the good folders and their tasks, and how many draws
    change_config: ([BERT, GPT2], 80),
    change_labels: ([BERT], 40),
    change_tokenizer: ([BERT, GPT2], 50),
    change_tokenizer_settings: ([BERT, GPT2], 50),
    change_tokenizer_bytes: ([BERT, GPT2], 50),
    change_weights: ([BERT, GPT2, ADAPTER], 60),
    change_index: ([BERT, GPT2], 20),
    change_adapter_settings: ([ADAPTER], 50),
    change_adapter_bytes: ([ADAPTER], 20),
}


def outcome(folder, task):
    """ "works", "refused", or what went wrong."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        use(folder, task)
        found = "works"
    except minift.InputError as e:
        found = "refused" if str(e).strip() else "an empty message"
        str(e).encode("utf-8", "surrogatepass")
    except BaseException as e:  # a panic of a library is no Exception
        found = f"{type(e).__name__}: {str(e)[:300]}"
    seconds = time.perf_counter() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if seconds > SECONDS or grown > BYTES:
        found += f", in {seconds:.1f} s and {grown / 2**20:.0f} MB"
    return found


@pytest.mark.parametrize("spoil", KINDS, ids=lambda f: f.__name__)
def test_hostile_folders(good, tmp_path, spoil):
    (folders, draws), found = KINDS[spoil], {}
    for seed in range(draws):
        rng = random.Random(f"{spoil.__name__} {seed}")
        name, task = folders[seed % len(folders)]
        shutil.copytree(good / name, tmp_path / "spoiled")
        spoil(tmp_path / "spoiled", rng)
        found[seed] = outcome(tmp_path / "spoiled", task)
        shutil.rmtree(tmp_path / "spoiled")
    wrong = {seed: what for seed, what in found.items() if what not in ("works", "refused")}
    assert not wrong, "\n".join(f"{seed}: {what}" for seed, what in wrong.items())
    assert "refused" in found.values()  # the generator does spoil something
