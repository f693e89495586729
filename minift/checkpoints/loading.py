"""A model from a checkpoint folder or the Hugging Face hub.

    model, tokenizer = load("bert-base-uncased", task="classify", labels=["negative", "positive"])

The model is built on the meta device, without memory, and filled tensor by tensor (weights.py). With base="nf4", or
"int8", the layers of the body are packed as they arrive. A PEFT adapter folder is its base model with the adapter
put around its layers.
"""

import re
import typing
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import parse_json
from ..data import tokenizer as tokenizers
from ..data.tokenizer import Tokenizer
from ..engine import memory
from ..errors import InputError, short_repr
from ..layers import linear_of
from ..layers.packed import PackedLinear, base_of_file, linears, part_of, swap, way_named
from ..models import Model, family_named
from ..tables import BASES, TASKS
from ..tasks import task_named, task_of_architecture, task_of_peft
from . import peft as peft_format
from .classes import Classes, choose_classes, on_meta, settle_classes
from .hub import adapter_file, address, base_of, has_weights, read_settings, resolve
from .weights import Report, draw_all, fill, hub_names, known_name, tensors, tensors_in

LAYERS = 1024  # most layers of a model; a config.json that asks for billions is answered at once
LABELS = 10**5  # most classes that have no names
SIZE = 10**8  # most of anything else that it counts


def load(
    source: str | Path,
    task: str | None = None,
    labels: list[str] | None = None,
    *,
    base: str = "",
    base_model: str | Path = "",
    fresh_head: bool = True,
    ordered: bool = True,
    dropout: float = -1,
    seed: int = 42,
    init: str = "pretrained",
    device: str | torch.device = "cpu",
) -> tuple[Model, Tokenizer | None]:
    """The model in `source` (a folder, a run folder, an adapter folder or a hub id), and its tokenizer or None.

    task: which head to put on it; None for the body alone.
    labels: names of the classes; None takes the checkpoint's own. Where these are the same names, the head's rows stay
    theirs; of other classes its last layer is drawn anew.
    ordered: whether the order of `labels` counts; else the checkpoint's holds where the names are the same.
    base: how the layers of the body are packed, of tables.BASES; "" leaves them as the checkpoint (or the adapter's
    run) had them.
    base_model: of an adapter, the folder or hub id of the model to adapt; "" takes the one that the adapter names.
    fresh_head: whether a missing head may be drawn at random (to be trained), else that is an error.
    dropout: one rate for all places; -1 keeps the config's. seed: of fresh weights.
    init: "random" draws every weight, and reads none from the folder; it has a config.json and, for text, a tokenizer.
    "shapes" leaves them on the meta device, without values (planning.py).
    Raises InputError. What was loaded, drawn and left out is in model.report.
    """
    place = locate(source, base_model)
    if init == "random":
        check_random(place)
    task = task or place.task
    classes = find_classes(place.settings, place.folder / "config.json", task, labels, ordered)
    fresh_classes = classes.fresh and place.adapter is None

    # an adapter's head is first read as it is; its rows are settled below, when all weights are there
    model = build(place.settings, place.folder, task, classes.first_rows(place.adapter is not None), dropout)
    model.max_length = place.of_run.get("max_length", 0)
    model.source = address(source)
    base = base or place.of_run.get("base", "")
    pack_layers(model, place.folder, base if base in BASES else "")
    if fresh_classes:
        model.set_last(on_meta(model.last, len(classes.rows)))  # though the file has it packed

    with memory.returned_memory():
        if init == "shapes":
            model.report = Report()
        elif init == "random":
            model.report = draw_all(model, seed)
        else:
            model.report = fill(model, place.folder, fresh_head or place.adapter is not None, seed, fresh_classes)
    model.report.notes += place.notes
    if init != "shapes":
        finish(model, place, classes, seed)
        if not fresh_head:
            check_trained(model, place, classes, labels)
        model.to(device)
    return model, load_tokenizer(model, place.given, place.folder)


@dataclass
class Place:
    """Where the parts of a model are, and what is said of it there."""

    given: Path  # the folder that was asked for
    folder: Path  # of the model: the same, or that of the adapter's base
    adapter: object | None  # the configuration of the adapter in `given`
    tensors: dict[str, Tensor]  # the adapter's
    task: str | None  # that an adapter is for
    settings: dict  # config.json, with what a run says of labels
    of_run: dict  # what a run said of itself, beside the hub's settings
    notes: list[str]  # for whoever loads it


def locate(source: str | Path, base_model: str | Path) -> Place:
    """The place of a model, or of an adapter and its base. Raises InputError."""
    given = resolve(source)
    notes: list[str] = []
    adapter, task, folder = find_adapter(given, base_model, notes)
    if base_model and adapter is None:
        raise InputError(f"--base-model is {base_model}, but {source} is no adapter; expected the adapter of a model")
    if adapter is None:
        found = {}
        settings = read_settings(folder)
    else:
        found = adapter_tensors(given)
        settings = settings_with_run(folder, given)
        if task:  # which other tasks may have the same name for, in PEFT
            task = task_of_peft(task_named(task).PEFT_TYPE, settings)
        task = task or task_beside(given)
    of_run = settings.pop("minift", {})
    return Place(given, folder, adapter, found, task, settings, of_run, notes)


def finish(model: Model, place: Place, classes: Classes, seed: int) -> None:
    """What is done when all weights are there: the head in float32, the adapter, the rows of the classes."""
    if model.task and isinstance(model.last, PackedLinear):
        # transformers packs it too; here a head's numbers are looked at, and learn
        model.set_last(linear_of(model.last.matrix(torch.float32), model.last.bias))
    if place.adapter:
        peft_format.put_adapter(model, place.given, place.adapter, place.tensors)
    if classes.own is not None:
        settle_classes(model, classes, seed)


def check_trained(model: Model, place: Place, classes: Classes, labels: list[str] | None) -> None:
    """Raises InputError where what a model says of a text is drawn at random, in whole or for some classes."""
    if model.adapter and model.report.fresh:
        fresh = ", ".join(model.report.fresh)
        raise InputError(f"{place.given}: neither it nor {place.folder} has a trained {fresh}")
    if model.report.relabelled:
        raise InputError(f"{place.given}: its classes are {classes.own}; expected a head trained for {labels}")


def check_random(place: Place) -> None:
    """Raises InputError where a folder is for more than the shape of a model whose weights are drawn."""
    what = ""
    if place.adapter is not None:
        what = "an adapter"
    elif place.settings.get("quantization_config"):
        what = "a model in few bits"
    if what:
        found = f"{place.given}: is {what}, which --init random has no use for"
        raise InputError(f"{found}; expected a model's config.json")


def find_classes(settings: dict, path: Path, task: str | None, labels: list[str] | None, ordered: bool) -> Classes:
    """The classes of the checkpoint and those asked for, joined; of a task without classes, none. Raises InputError."""
    if task is None or not task_named(task).NAMED_CLASSES:
        return Classes([])
    own = label_names(settings, path)
    task_named(task).check_settings(settings, labels, own, path)
    return choose_classes(own, labels, ordered)


def settings_with_run(folder: Path, given: Path) -> dict:
    """The config.json of an adapter's base, with what the run in `given` says of labels, padding and storage.

    The shape of the model is its base's affair.
    """
    settings = read_settings(folder)
    names = (peft_format.SETTINGS, "config.json")  # the second of an older minift, or of a whole model beside it
    name = next((name for name in names if (given / name).is_file()), None)
    if name is None:
        return settings
    of_run = read_settings(given, name)
    settings.pop("problem_type", None)  # of the base's head; the run has its own
    keys = ("id2label", "label2id", "problem_type", "pad_token_id", "minift")
    settings |= {key: of_run[key] for key in keys if key in of_run}
    return settings


def task_beside(given: Path) -> str | None:
    """The task of an adapter that PEFT has no name for, as minift wrote it beside; None where nothing says it."""
    if not (given / peft_format.SETTINGS).is_file():
        return None
    settings = read_settings(given, peft_format.SETTINGS)
    return task_of_architecture(family_named(settings["model_type"]), settings)


def load_tokenizer(model: Model, given: Path, folder: Path) -> Tokenizer | None:
    """The tokenizer of the adapter or, where that has none, of its base; made to fit the model, or refused."""
    found = next((place for place in (given, folder) if tokenizers.has_tokenizer(place)), None)
    if found is None:
        return None
    tokenizer = tokenizers.read_tokenizer(found, model.family.TOKENIZER)
    check_tokenizer(tokenizer, model, found)
    declare_end(model, tokenizer, folder)
    return tokenizer


def find_adapter(given: Path, base_model: str | Path, notes: list[str]) -> tuple[object | None, str | None, Path]:
    """(the adapter's configuration or None, the task it is for, the folder of the model) of a folder."""
    config = given / peft_format.CONFIG
    if not config.is_file():
        return None, None, given
    if has_weights(given) and not adapter_file(given):
        notes.append(f"{given}: {config.name} is there without an adapter; its own model is used")
        return None, None, given
    adapter, kind, more = peft_format.read_config(given)
    notes += more
    base = base_of(given, adapter.base, base_model, notes)
    folder = resolve(base, "" if base_model else str(config))
    if folder != given and adapter_file(folder):
        raise InputError(f"{config}: its base {base} is an adapter itself; expected a model (merge that one first)")
    return replace(adapter, base=base), kind, folder


def check_tokenizer(tokenizer: Tokenizer, model: Model, folder: Path) -> None:
    """Raises InputError where the tokenizer gives what the model has no embedding for."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}; expected below "
            f"{model.config.vocab_size}, the rows of the model's embedding"
        )
    kinds = model.config.token_types
    if kinds and tokenizer.types > kinds:
        raise InputError(
            f"{folder}: the tokenizer gives a text the token type {tokenizer.types - 1}; expected below {kinds}, "
            "the rows of the model's token type embedding"
        )


def declare_end(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Makes `eos_token_id` of the model's settings what ends a text: it is trained, stopped at, and saved.

    The first of these that the tokenizer has: generation_config.json's, config.json's, the tokenizer's own.
    """
    path = folder / "generation_config.json"
    generation = parse_json(path.read_bytes(), path) if path.is_file() else {}
    declared = generation.get("eos_token_id") if isinstance(generation, dict) else None
    for found in (declared, model.settings.get("eos_token_id"), tokenizer.end):
        ids = found if isinstance(found, list) else [found]
        ids = [i for i in ids if type(i) is int and tokenizer.token(i) is not None]
        if ids and model.generates:
            model.settings = model.settings | {"eos_token_id": ids if len(ids) > 1 else ids[0]}
            return


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter. Raises InputError."""
    path = adapter_file(folder)
    if path is None:
        raise InputError(f"{folder}: no adapter; expected {' or '.join(peft_format.WEIGHT_FILES)}")
    return {name: read().clone() for name, _, read in tensors_in(path)}


def build(settings: dict, folder: Path, task: str | None, labels: list[str], dropout: float) -> Model:
    """The model on the meta device."""
    family, path = family_named(settings["model_type"]), Path(folder, "config.json")
    known = shape_of(family, settings, path)
    try:
        config = family.Config(**known)
    except ValueError as e:
        raise InputError(f"{path}: {e}") from e
    if dropout >= 0:
        config = replace(config, **config.with_dropout(dropout))
    if task and task_named(task).architecture(family) is None:
        possible = [name for name in TASKS if task_named(name).architecture(family)]
        raise InputError(
            f"{folder}: {settings['model_type']} has no head for {task}; expected one of {', '.join(possible)}"
        )
    with torch.device("meta"):
        head = task_named(task).make_head(family, config, len(labels)) if task else None
        return Model(settings, config, head, task, labels)


def shape_of(family, settings: dict, path: Path) -> dict:
    """The fields of config.json that a family's Config has. Raises InputError that names one that cannot be."""
    known = {}
    for f in fields(family.Config):
        names = [f.name, *(alias for alias, name in family.ALIASES.items() if name == f.name)]
        given = {name: settings[name] for name in names if name in settings}
        for name, value in given.items():
            if expected := fault_of(f.name, f.type, value):
                raise InputError(f"{path}: {name} is {short_repr(value)}; expected {expected}")
            if known.setdefault(f.name, value) != value:
                raise InputError(f"{path}: {name} is {value!r}, but {f.name}, its other name, {known[f.name]!r}")
    return known


def fault_of(name: str, kind: type, value: object) -> str:
    """What a field of Config should be, where `value` is not; else "". kind: its type, as declared there."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return ""
    if kinds[0] is int:
        least = 0 if name.endswith("_token_id") else 1
        most = LAYERS if re.search(r"_layers?$", name) else SIZE
        good, expected = type(value) is int and least <= value <= most, f"a whole number from {least} to {most:,}"
    elif kinds[0] is float and re.search(r"dropout|_pdrop$", name):
        good, expected = type(value) in (int, float) and 0 <= value < 1, "a rate from 0 to below 1"
    elif kinds[0] is float:
        good, expected = type(value) in (int, float) and 0 <= value <= SIZE, "a number, 0 or above"
    else:
        good, expected = type(value) is kinds[0], {bool: "true or false", str: "a string"}[kinds[0]]
    return "" if good else expected


def label_names(settings: dict, path: Path) -> list[str]:
    """The names of a checkpoint's classes, in the order of their numbers. Raises InputError."""
    by_id = settings.get("id2label")
    if by_id is None or by_id == {}:
        n = settings.get("num_labels") or 2  # as transformers
        if type(n) is not int or not 1 <= n <= LABELS:
            raise InputError(f"{path}: num_labels is {short_repr(n)}; expected a whole number from 1 to {LABELS:,}")
        return [f"LABEL_{i}" for i in range(n)]
    expected = 'expected an object from each number to its name, as {"0": "negative", "1": "positive"}'
    if not isinstance(by_id, dict) or not all(re.fullmatch("0|[1-9][0-9]{0,8}", str(key)) for key in by_id):
        raise InputError(f"{path}: id2label is {short_repr(by_id)}; {expected}")
    by_id = {str(key): name for key, name in by_id.items()}
    gap = next((i for i in range(len(by_id)) if str(i) not in by_id), None)
    if gap is not None:
        raise InputError(f"{path}: id2label has {len(by_id)} names, but none for {gap}; {expected}")
    names = [by_id[str(i)] for i in range(len(by_id))]
    for name in names:
        if not isinstance(name, str) and type(name) is not int:
            raise InputError(f"{path}: id2label has {short_repr(name)} as a name; {expected}")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise InputError(f"{path}: id2label has the name {short_repr(twice)} twice; expected different ones")
    return names


def pack_layers(model: Model, folder: Path, base: str) -> None:
    """Puts packed layers where weights are to be packed (base, of tables.BASES), or are packed in the file."""
    settings = model.settings.get("quantization_config") or {}
    in_file = base_of_file(settings)
    if in_file is None:
        raise InputError(
            f"{folder / 'config.json'}: quantization_config is {short_repr(settings)}; "
            "expected bitsandbytes' nf4 or load_in_8bit, or none"
        )
    if base and in_file and base != in_file:
        raise InputError(f"{folder}: is in {in_file} already; expected the original for --base {base}")
    model.settings = {k: v for k, v in model.settings.items() if k != "quantization_config"}
    layers = {name for name, _ in linears(model)} if base else set()
    packed = set()
    if in_file:
        ours = {hub: name for name, hub in hub_names(model).items()}
        mark = way_named(in_file).MARK
        for raw, *_ in tensors(folder):
            weight, part = part_of(raw)
            name = ours.get(known_name(weight, ours, model.family.PREFIX)[0])
            if part == mark and name:
                packed.add(name.removesuffix(".weight"))
    for name in sorted(layers | packed):
        swap(model, name, in_file or base).is_packed_in_file = name in packed
