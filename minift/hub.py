"""A checkpoint folder in and out: from a local folder or the Hugging Face hub, to a folder that transformers loads.

    model, tokenizer = load("bert-base-uncased", task="classify", labels=["negative", "positive"])
    save(model, tokenizer, "reviews-model")

The model is built on the meta device, without memory, and filled tensor by tensor; what the file lacks and may lack
(a new task's head) is drawn at random. Everything else that does not fit is an error that names the tensor. With
base="nf4" the layers of the body are packed into four bits as they arrive. Loading never takes more than the result and
one tensor, and afterwards the file may go. A PEFT adapter folder is its base model with the adapter put around its
layers.
"""

import json
import math
import re
import ssl
import threading
import typing
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from http.client import HTTPException
from pathlib import Path

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import tokenizer as tokenizers
from .adapters import peft_format
from .adapters.lora import LoRAConfig, wrappers
from .adapters.lora import put as replace_module
from .config import InputError, parse_json, printable
from .distributed import whole
from .files import check_folder, write_folder
from .layers import Linear
from .models import FAMILIES, Model
from .ops import native
from .quantize import PARTS, STATE, NF4Linear, linears, quantization_config, swap
from .tokenizer import Tokenizer

MODEL = "model.safetensors"
WEIGHT_FILES = (
    MODEL,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


LAYERS = 1024  # most layers of a model; a config.json that asks for billions is answered at once
LABELS = 10**5  # most classes that have no names
SIZE = 10**8  # most of anything else that it counts
WRAPPERS = r"(?:(?:state_dict|model_state_dict|module|model|_orig_mod|_fsdp_wrapped_module)\.)*"  # before names
REACH = 1.8  # seconds in which the hub has to answer
IN_CACHE = 1 << 18  # numbers: what is copied at once, so that looking at it again costs little


@dataclass
class Report:
    """What loading met, in the hub's names."""

    loaded: int = 0
    adapter: int = 0  # tensors of an adapter, put around them
    fresh: list[str] = field(default_factory=list)  # missing in the file, drawn at random
    reshaped: list[str] = field(
        default_factory=list
    )  # of another shape in the file (another number of labels), drawn at random
    relabelled: list[str] = field(default_factory=list)  # of other classes in the file, drawn at random
    labels: str = ""  # what became of the checkpoint's classes, where that is worth a word
    unused: list[str] = field(default_factory=list)  # in the file, for another task
    notes: list[str] = field(default_factory=list)  # what else was unusual and how it was taken, a sentence each

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded" + f", {self.adapter} of an adapter" * bool(self.adapter)]
        for names, what in (
            (self.fresh, "missing, freshly initialised"),
            (self.reshaped, "of another shape, freshly initialised"),
            (self.relabelled, "of other classes, freshly initialised"),
            (self.unused, "of another task, not used"),
        ):
            if names:
                lines.append(f"{len(names)} {what}: {', '.join(names)}")
        if self.labels:
            lines.append(self.labels)
        return "\n".join(lines + self.notes)


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
    device: str | torch.device = "cpu",
) -> tuple[Model, Tokenizer | None]:
    """The model in `source` (a folder, a run folder, an adapter folder or a hub id), and its tokenizer or None.

    task: which head to put on it; None for the body alone.
    labels: names of the classes; None takes the checkpoint's own. Where these are the same names, the head's rows stay
    theirs; of other classes its last layer is drawn anew.
    ordered: whether the order of `labels` counts; else the checkpoint's holds where the names are the same.
    base: "nf4" packs the layers of the body into four bits; "" leaves them as the checkpoint (or the adapter's run)
    had them.
    base_model: of an adapter, the folder or hub id of the model to adapt; "" takes the one that the adapter names.
    fresh_head: whether a missing head may be drawn at random (to be trained), else that is an error.
    dropout: one rate for all places; -1 keeps the config's. seed: of fresh weights.
    Raises InputError. What was loaded, drawn and left out is in model.report.
    """
    given, notes = resolve(source), []
    adapter, kind, folder = find_adapter(given, base_model, notes)
    if base_model and adapter is None:
        raise InputError(f"--base-model is {base_model}, but {source} is no adapter; expected the adapter of a model")
    extra = adapter_tensors(given) if adapter else {}
    task = task or kind
    settings = read_settings(folder)
    if adapter and (given / "config.json").is_file():  # a run's; the shape of the model is its base's affair
        of_run = read_settings(given)
        settings |= {key: of_run[key] for key in ("id2label", "label2id", "pad_token_id", "minift") if key in of_run}
        settings.pop("problem_type", None)  # of the base's head; the run has its own
    packed = (settings.get("minift") or {}).pop("base", "")  # how the run kept its base
    classes = Classes(labels)
    if task == "classify":
        check_head(settings, labels, folder / "config.json")
        own = label_names(settings, folder / "config.json")
        classes = choose_classes(own, labels, ordered)
    fresh_classes = classes.fresh and not adapter  # an adapter's head is first read as it is
    model = build(settings, folder, task, classes.first_rows(adapter is not None), dropout)
    prepare(model, folder, base or packed)
    if fresh_classes:
        model.head.out = on_meta(model.head.out, len(classes.rows))  # though the file has it in four bits
    with native.returned_memory():
        model.report = fill(model, folder, fresh_head or adapter is not None, seed, fresh_classes)
        model.source = address(source)
    model.report.notes += notes
    if model.task and isinstance(model.head.out, NF4Linear):
        model.head.out = unpacked(
            model.head.out
        )  # which transformers packs too; a head's numbers are looked at, and learn
    if adapter:
        peft_format.load(model, given, adapter, extra)
        if model.report.fresh and not fresh_head:
            raise InputError(f"{given}: neither it nor {folder} has a trained {', '.join(model.report.fresh)}")
    if task == "classify":
        settle_classes(model, classes, seed)
        if model.report.relabelled and not fresh_head:
            raise InputError(f"{given}: its classes are {classes.own}; expected a head trained for {labels}")
    found = next((place for place in (given, folder) if tokenizers.is_there(place)), None)
    tokenizer = tokenizers.load(found) if found else None
    if tokenizer:
        check_tokenizer(tokenizer, model, found)
        declare_end(model, tokenizer, folder)
    return model.to(device), tokenizer


def find_adapter(given: Path, base_model: str | Path, notes: list[str]) -> tuple[LoRAConfig | None, str | None, Path]:
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
    if tokenizer.vocab_size > model.config.vocabulary:
        raise InputError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}; expected below "
            f"{model.config.vocabulary}, the rows of the model's embedding"
        )
    kinds = getattr(model.config, "type_vocab_size", None)
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
        if ids and model.task == "complete":
            model.settings = model.settings | {"eos_token_id": ids if len(ids) > 1 else ids[0]}
            return


# where the files are


def resolve(source: str | Path, named_by: str = "") -> Path:
    """The folder with a model's files: `source` itself, the best or last model of a run folder, or the hub's cache.

    named_by: who says that the model is there, for the message where it is not.
    """
    folder = Path(source)
    if folder.is_dir():
        inner = ("best", "last", "0_Transformer")  # of a run; of sentence-transformers
        return next((folder / name for name in inner if (folder / name / "config.json").is_file()), folder)
    who = f"{named_by} names " if named_by else ""
    if is_path(source) or folder.exists():
        advice = "; if it moved, say where it is: --base-model FOLDER" if named_by else ""
        raise InputError(f"{who}{source}: no such folder{advice}")
    return download(str(source), who)


def is_path(source: str | Path) -> bool:
    """Whether this can only be the path of a folder, and no hub id."""
    text = str(source)
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text  # the last is Windows'


def address(source: str | Path) -> str:
    """How another folder's files name a model: the whole path of a local one, or its hub id."""
    return str(resolve(source).resolve()) if Path(source).is_dir() else str(source)


def base_of(given: Path, named: str, base_model: str | Path, notes: list[str]) -> str:
    """The folder or hub id of the model that the adapter in `given` adapts. Raises InputError where nothing says it."""
    config = given / peft_format.CONFIG
    if base_model:
        return address(base_model)
    if has_weights(given) and (not named or Path(named).resolve() == given.resolve()):
        return address(given)
    if not named:
        raise InputError(f"{config}: no base_model_name_or_path; expected the model to adapt (or --base-model FOLDER)")
    # a run that changed its base keeps it beside its models; the two move together
    beside = given.parent / Path(named).name
    if beside.name == "base" and (beside / "config.json").is_file():
        return address(beside)
    is_gone = is_path(named) and not Path(named).is_dir()
    if is_gone and (beside / "config.json").is_file():
        notes.append(f"{named}, which {config} names, is not there; {beside} is used")
        return address(beside)
    if is_gone and has_weights(given):
        notes.append(f"{named}, which {config} names, is not there; the model beside the adapter is used")
        return address(given)
    if has_weights(given):
        notes.append(f"{given}: the model beside the adapter is not used; {config.name} names {named}")
    return named


def has_weights(folder: Path) -> bool:
    """Whether a whole model is in a folder."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def adapter_file(folder: Path) -> Path | None:
    """The file with an adapter's tensors, or None."""
    return next((folder / name for name in peft_format.WEIGHT_FILES if (folder / name).is_file()), None)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter. Raises InputError."""
    path = adapter_file(folder)
    if path is None:
        raise InputError(f"{folder}: no adapter; expected {' or '.join(peft_format.WEIGHT_FILES)}")
    reader = safetensors_in if path.suffix == ".safetensors" else pickled_in
    return {name: read().clone() for name, _, read in reader(path)}


def download(repo: str, who: str = "") -> Path:
    """The hub's files of `repo` (an id such as bert-base-uncased or user/model), in huggingface-hub's cache."""
    offline = constants.HF_HUB_OFFLINE or not is_in_reach()

    def fetch(name: str) -> Path | None:
        try:
            if not offline:
                return Path(hf_hub_download(repo, name))
            cached = try_to_load_from_cache(repo, name)
            return Path(cached) if isinstance(cached, str) else None
        except EntryNotFoundError:  # also where the hub went out of reach just now
            return None
        except (HfHubHTTPError, HFValidationError) as e:
            raise InputError(f"{who}{repo}: no such folder, and the hub says: {str(e).strip().splitlines()[-1]}") from e

    config = fetch(peft_format.CONFIG)
    if config is not None:
        _ = fetch(peft_format.WEIGHT_FILES[0]) or fetch(peft_format.WEIGHT_FILES[1])
    config = fetch("config.json") or config
    if config is None and offline:
        raise InputError(
            f"{who}{repo}: no such folder, the hub ({constants.ENDPOINT}) is out of reach, and its cache "
            f"({constants.HF_HUB_CACHE}) has no such model; expected a folder with a model's files, or a network"
        )
    if config is None:
        raise InputError(f"{who}{repo}: no such folder, and no config.json of it on the hub")
    for name in (*tokenizers.FILES, "generation_config.json"):
        fetch(name)
    weights = next((path for path in map(fetch, WEIGHT_FILES) if path), None)
    if weights and weights.suffix == ".json":
        for shard in set(read_index(weights).values()):
            fetch(shard)
    return config.parent


def is_in_reach() -> bool:
    """Whether the hub answers at all, asked once and briefly: its client would try for most of a minute."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=REACH).close()
        except urllib.error.HTTPError:
            pass  # an answer, too
        except (OSError, ValueError, HTTPException) as e:
            if not isinstance(getattr(e, "reason", None), ssl.SSLError):  # of certificates, the client knows more
                return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # looking a name up has no time limit of its own
    thread.start()
    thread.join(REACH)
    return answered.is_set()


def read_settings(folder: Path) -> dict:
    """The model's config.json. Raises InputError that names the field, where one is of a kind that nobody can use."""
    path = folder / "config.json"
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; {', '.join(inside[:5])} in it {'has' if len(inside) == 1 else 'have'} one" if inside else ""
        raise InputError(f"{folder}: no config.json; expected a model folder as transformers writes it{hint}")
    settings = parse_json(path.read_bytes(), path)
    found = settings.get("model_type") if isinstance(settings, dict) else type(settings).__name__
    if not isinstance(settings, dict) or not isinstance(found, str) or found not in FAMILIES:
        raise InputError(f"{path}: model_type is {short(found)}; expected one of {', '.join(FAMILIES)}")
    for name, kind in (("minift", dict), ("quantization_config", dict), ("architectures", list)):
        if not isinstance(settings.get(name) or kind(), kind):
            expected = {dict: "an object", list: "a list"}[kind]
            raise InputError(f"{path}: {name} is {short(settings[name])}; expected {expected}")
    own = settings["minift"] = settings.get("minift") or {}
    length = own.get("max_length", 0)
    if own.get("base", "") not in ("", "nf4") or type(length) is not int or length < 0:
        raise InputError(f"{path}: minift is {short(own)}; expected base nf4 or none, and max_length a number")
    if not own:
        del settings["minift"]
    return settings


def short(value: object) -> str:
    """A value of a file as a message shows it: at most a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# the model without memory


def build(settings: dict, folder: Path, task: str | None, labels: list[str] | None, dropout: float) -> Model:
    """The model on the meta device."""
    family, path = FAMILIES[settings["model_type"]], Path(folder, "config.json")
    known = shape_of(family, settings, path)
    try:
        config = family.Config(**known)
    except ValueError as e:
        raise InputError(f"{path}: {e}") from e
    if dropout >= 0:
        config = replace(config, **config.with_dropout(dropout))
    if task and task not in family.HEADS:
        raise InputError(
            f"{folder}: {settings['model_type']} has no head for {task}; expected one of {', '.join(family.HEADS)}"
        )
    if labels is None:
        labels = label_names(settings, path) if task == "classify" else []
    with torch.device("meta"):
        return Model(settings, config, task, labels)


def shape_of(family, settings: dict, path: Path) -> dict:
    """The fields of config.json that a family's Config has. Raises InputError that names one that cannot be."""
    known = {}
    for f in fields(family.Config):
        names = [f.name, *(alias for alias, name in family.ALIASES.items() if name == f.name)]
        given = {name: settings[name] for name in names if name in settings}
        for name, value in given.items():
            if expected := fault_of(f.name, f.type, value):
                raise InputError(f"{path}: {name} is {short(value)}; expected {expected}")
            if known.setdefault(f.name, value) != value:
                raise InputError(f"{path}: {name} is {value!r}, but {f.name}, its other name, {known[f.name]!r}")
    return known


def fault_of(name: str, kind: type, value: object) -> str:
    """What a field of Config should be, where `value` is not; else "". kind: its type, as declared there."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and type(None) in kinds:
        return ""
    if kinds[0] is int:
        most = LAYERS if name in ("num_hidden_layers", "n_layer") else SIZE
        good, expected = type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most:,}"
    elif kinds[0] is float and re.search(r"dropout|_pdrop$", name):
        good, expected = type(value) in (int, float) and 0 <= value < 1, "a rate from 0 to below 1"
    elif kinds[0] is float:
        good, expected = type(value) in (int, float) and 0 <= value <= SIZE, "a number, 0 or above"
    else:
        good, expected = type(value) is kinds[0], {bool: "true or false", str: "a string"}[kinds[0]]
    return "" if good else expected


def check_head(settings: dict, labels: list[str] | None, path: Path) -> None:
    """Raises InputError where the checkpoint's head is for something else than one label of several.

    labels: those of a new task; where they are as many as the head has outputs, it would be trained further.
    """
    kind = settings.get("problem_type")
    found = label_names(settings, path) if labels is None or kind else labels
    is_own = labels is None or len(labels) == len(found)
    if is_own and kind in ("regression", "multi_label_classification"):
        raise InputError(
            f"{path}: problem_type is {kind!r}, whose head is not supported; expected single_label_classification"
        )
    if labels is None and len(found) == 1:
        raise InputError(
            f"{path}: its head has one output (num_labels 1), a number and no label; expected two labels or more"
        )


def label_names(settings: dict, path: Path) -> list[str]:
    """The names of a checkpoint's classes, in the order of their numbers. Raises InputError."""
    by_id = settings.get("id2label")
    if by_id is None or by_id == {}:
        n = settings.get("num_labels") or 2  # as transformers
        if type(n) is not int or not 1 <= n <= LABELS:
            raise InputError(f"{path}: num_labels is {short(n)}; expected a whole number from 1 to {LABELS:,}")
        return [f"LABEL_{i}" for i in range(n)]
    expected = 'expected an object from each number to its name, as {"0": "negative", "1": "positive"}'
    if not isinstance(by_id, dict) or not all(re.fullmatch("0|[1-9][0-9]{0,8}", str(key)) for key in by_id):
        raise InputError(f"{path}: id2label is {short(by_id)}; {expected}")
    by_id = {str(key): name for key, name in by_id.items()}
    gap = next((i for i in range(len(by_id)) if str(i) not in by_id), None)
    if gap is not None:
        raise InputError(f"{path}: id2label has {len(by_id)} names, but none for {gap}; {expected}")
    names = [by_id[str(i)] for i in range(len(by_id))]
    for name in names:
        if not isinstance(name, str) and type(name) is not int:
            raise InputError(f"{path}: id2label has {short(name)} as a name; {expected}")
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        twice, _ = Counter(names).most_common(1)[0]
        raise InputError(f"{path}: id2label has the name {short(twice)} twice; expected different ones")
    return names


def prepare(model: Model, folder: Path, base: str) -> None:
    """Puts NF4Linears where weights are to be packed (base "nf4"), or are packed in the file."""
    packed = read_settings(folder).get("quantization_config") or {}
    if packed and (packed.get("quant_method"), packed.get("bnb_4bit_quant_type")) != ("bitsandbytes", "nf4"):
        raise InputError(
            f"{folder / 'config.json'}: quantization_config is {short(packed)}; expected bitsandbytes' nf4, or none"
        )
    model.settings = {k: v for k, v in model.settings.items() if k != "quantization_config"}
    layers = {name for name, _ in linears(model)} if base == "nf4" else set()
    if packed:
        ours = {hub: name for name, hub in hub_names(model).items()}
        for raw, *_ in tensors(folder):
            weight, is_state, _ = raw.partition(f".{STATE}")
            name = ours.get(known_name(weight, ours, model.family.PREFIX)[0])
            layers |= {name.removesuffix(".weight")} if is_state and name else set()
    for name in sorted(layers):
        swap(model, name)


def unpacked(layer: NF4Linear) -> Linear:
    """The same layer with its weight in float32."""
    new = Linear(layer.in_features, layer.out_features, layer.bias is not None)
    new.weight = nn.Parameter(layer.matrix(torch.float32).clone())
    new.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
    return new


# the classes


@dataclass
class Classes:
    """Which classes a model gets, and what becomes of the rows that the checkpoint has for its own."""

    rows: list[str] | None  # in the order of the head's rows as they are loaded; None: the checkpoint's own
    labels: list[str] | None = None  # the order they are put in afterwards, if it is another
    own: list[str] | None = None  # the checkpoint's
    fresh: bool = False  # whether the last layer is drawn anew
    said: str = ""  # of a last layer that is not drawn anew

    def first_rows(self, is_adapter: bool) -> list[str] | None:
        """The labels that the model is built with: those of an adapter's own head if that does not stay."""
        if is_adapter and self.rows and self.own and (self.fresh or len(self.rows) != len(self.own)):
            return self.own
        return self.rows


def choose_classes(own: list[str], wanted: list[str] | None, ordered: bool) -> Classes:
    """The one place where a checkpoint's classes and those asked for (of the data, or of --labels) are joined.

    LABEL_0 or 0 is no name, only a number: such rows are given the names wanted, in their order.
    """
    if wanted is None or own == wanted:
        return Classes(wanted, own=own)
    if all(name in (f"LABEL_{i}", str(i)) for i, name in enumerate(own)):
        named = ", ".join(f"{i} {printable(name)}" for i, name in enumerate(wanted))
        same = len(own) == len(wanted)
        return Classes(wanted, own=own, said=f"its classes had no names, and are now: {named}" if same else "")
    numbers = {str(i) for i in range(len(own))}
    spelt = {name.casefold(): name for name in wanted}
    if sorted(map(str.casefold, own)) == sorted(map(str.casefold, wanted)) and len(spelt) == len(own):
        own = [spelt[name.casefold()] for name in own]  # ENTAILMENT is entailment; the data's spelling is kept
    if own == wanted:
        return Classes(wanted, own=own)
    if sorted(own) == sorted(wanted) or not ordered and set(wanted) <= numbers and not numbers & set(own):
        order = ", ".join(f"{i} {printable(name)}" for i, name in enumerate(wanted if ordered else own))
        what = "the head's rows were put in the order of --labels" if ordered else "classes as the checkpoint has them"
        return Classes(own, wanted if ordered else None, own, said=f"{what}: {order}")
    return Classes(wanted, own=own, fresh=True)


def settle_classes(model: Model, classes: Classes, seed: int) -> None:
    """What can be done only when all weights are there: a head under an adapter drawn anew, rows put in order."""
    report, out = model.report, model.head.out
    if classes.rows and model.labels != classes.rows:
        model.head.out = on_meta(out, len(classes.rows))
        model.labels = classes.rows
        draw(model, seed)
        report.relabelled = ["its last layer"]
    if report.relabelled:
        report.relabelled = [model.hub_name(f"head.out.{name}") for name, _ in model.head.out.named_parameters()]
        own = ", ".join(map(printable, classes.own))
        report.labels = f"the checkpoint's classes were {own}; to go on with these, name them all: --labels"
    elif classes.labels:
        rows = [model.labels.index(name) for name in classes.labels]
        for parameter in out.parameters():
            parameter.data = parameter.data[rows]
        model.labels = classes.labels
    if not any(name.startswith("head.out.") for name in fresh_names(model)):
        report.labels = report.labels or classes.said


def on_meta(layer: nn.Module, rows: int) -> Linear:
    """A layer like this one for another number of rows, without memory: to be drawn."""
    with torch.device("meta"):
        return Linear(layer.in_features, rows, layer.bias is not None)


def fresh_names(model: Model) -> list[str]:
    """Our names of what was drawn at random because the file lacks it or has another shape of it."""
    drawn = {*model.report.fresh, *model.report.reshaped}
    return [name for name, hub in hub_names(model).items() if hub in drawn]


# the weights


def fill(model: Model, folder: Path, fresh_head: bool, seed: int, fresh_classes: bool = False) -> Report:
    """Streams the checkpoint into the model, draws what may be missing, and says so. Raises InputError.

    fresh_classes: whether the last layer of the head is drawn though the file has one, of other classes.
    """
    names, report, faults = hub_names(model), Report(), []
    ours = {hub: name for name, hub in names.items()}
    packed: dict[str, dict[str, Tensor]] = {}  # weights that are in four bits in the file: their parts
    wrapped: set[str] = set()  # what a wrapper left in front of the names
    layers = dict(model.named_modules())  # looked up by name, each, they would take longer than small tensors
    in_bits = any(isinstance(m, NF4Linear) for m in layers.values())
    tied = model.hub_name(model.head.tied[0]) if model.tied else ""
    second = ""  # what the file calls a tied head that it has too
    for raw, shape, read in tensors(folder):
        weight, part = split_part(raw)
        hub, before = known_name(weight, ours, model.family.PREFIX)
        wrapped.add(before)
        if hub in ours and fresh_classes and ours[hub].startswith("head.out."):
            report.relabelled += [] if hub in report.relabelled else [hub]
            continue
        if in_bits and hub in ours and not part and can_pack(model, ours[hub]):
            part = "weight" if is_packed(shape, get(model, ours[hub])) else ""
        if hub in ours and part:
            packed.setdefault(hub, {})[part] = read()
        elif hub == tied:
            second = raw  # compared when the embedding is there, or the only one of the two that is
        elif hub in ours:
            layer = layers[ours[hub].rpartition(".")[0]]
            faults += place(model, layer, ours[hub], hub, raw, shape, read, report)
        elif re.fullmatch(model.family.OTHER_HEADS, hub):
            report.unused.append(hub)
        elif not re.fullmatch(model.family.IGNORED, hub):
            faults.append(f"{raw} {shape} is in the file, but not in the model")
    for hub, parts in packed.items():
        fault = "is in 4 bits, which config.json says nothing of (quantization_config)"
        if can_pack(model, ours[hub]):
            fault = model.get_submodule(ours[hub].removesuffix(".weight")).receive(parts)
        faults += [f"{hub} {fault}"] if fault else []
        report.loaded += 1
    if second and leaf_of(layers, model.head.tied[1]).is_meta:  # saved once, under the head's name (save_model)
        faults += place_embedding(model, layers, folder, second, report)
        second = ""
    drawn = {*report.reshaped, *report.relabelled, *packed}
    missing = [n for n, hub in names.items() if hub not in drawn and leaf_of(layers, n).is_meta]
    report.fresh = [names[n] for n in missing if n.startswith("head.")]
    faults += [f"{names[n]} is missing in the file" for n in missing if not n.startswith("head.")]
    if not fresh_head:
        faults += [
            f"{hub}, of the {model.task} head, is missing or of another shape; expected a trained head"
            for hub in report.fresh + report.reshaped
        ]
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputError(f"{folder}: the weights do not fit the model:\n  " + "\n  ".join(faults[:20]) + more)
    draw(model, seed)
    model.tie()
    if second:
        untie_where_different(model, folder, second, report)
    for before in sorted(wrapped - {""}):
        report.notes.append(f"names in the file begin with {before}, which was taken off")
    return report


def place_embedding(model: Model, layers: dict[str, nn.Module], folder: Path, raw: str, report: Report) -> list[str]:
    """Puts the tensor `raw` of the file where the word embedding belongs; returns what is wrong with it."""
    name = model.head.tied[1]
    reading = tensors(folder)
    shape, read = next((shape, read) for found, shape, read in reading if found == raw)
    layer = layers[name.rpartition(".")[0]]
    faults = place(model, layer, name, model.hub_name(name), raw, shape, read, report)
    reading.close()
    return faults


def untie_where_different(model: Model, folder: Path, raw: str, report: Report) -> None:
    """Gives a tied head the weight `raw` of the file, unless it is the embedding's: as transformers does."""
    reading = tensors(folder)
    tensor = next(read() for name, _, read in reading if name == raw)
    embedding = model.head.out.weight
    if tensor.shape != embedding.shape or not tensor.is_floating_point():
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise InputError(f"{folder}: {raw} is {found} in the file; expected {tuple(embedding.shape)}, floating-point")
    if not torch.equal(tensor.float(), embedding):
        model.untie()
        with torch.no_grad():
            is_finite = copy_finite(model.head.out.weight, tensor)
        if not is_finite:
            raise InputError(f"{folder}: {raw} has numbers that are not finite")
        report.loaded += 1
        report.notes.append(
            f"{raw} is not the word embedding, though config.json ties the two (tie_word_embeddings): both are used"
        )
    reading.close()


def split_part(raw: str) -> tuple[str, str]:
    """(name of the weight, part of it) of a tensor that belongs to a weight in four bits; else (raw, "")."""
    for part in PARTS:
        if raw.endswith(f".weight.{part}"):
            return raw.removesuffix(f".{part}"), part
    return raw, ""


def can_pack(model: Model, name: str) -> bool:
    """Whether `name` is the weight of a layer that keeps it in four bits."""
    return name.endswith(".weight") and isinstance(model.get_submodule(name[:-7]), NF4Linear)


def get(model: Model, name: str) -> Tensor:
    """The parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def leaf_of(layers: dict[str, nn.Module], name: str) -> Tensor:
    """The parameter or buffer called `name` of a model with these modules."""
    path, _, leaf = name.rpartition(".")
    return getattr(layers[path], leaf)


def place(
    model: Model, layer: nn.Module, name: str, hub: str, raw: str, shape: tuple, read: Callable, report: Report
) -> list[str]:
    """Puts one tensor of the file where it belongs, in `layer`; returns what is wrong with it, if anything."""
    leaf, flip = name.rpartition(".")[2], is_transposed(model, hub)
    pack, now = isinstance(layer, NF4Linear) and leaf == "weight", getattr(layer, leaf)
    want = (layer.out_features, layer.in_features) if pack else tuple(now.shape)
    want = want[::-1] if flip else want
    if not now.is_meta:
        return [f"{hub} is in the file twice, the second time as {raw}"]
    if shape != want and name.startswith("head.out."):
        report.reshaped.append(hub)
        return []
    if shape != want:
        return [f"{raw} is {shape} in the file; expected {want}"]
    tensor = read()
    if not tensor.is_floating_point():
        return [f"{raw} is {tensor.dtype} in the file; expected floating-point numbers"]
    if pack:
        is_finite = math.isfinite(total(tensor)) or bool(tensor.isfinite().all())
        layer.pack(tensor.t() if flip else tensor)
    else:
        ours = torch.empty(want[::-1] if flip else want)
        is_finite = copy_finite(ours, tensor, flip)
        setattr(layer, leaf, nn.Parameter(ours))
    if not is_finite:
        return [f"{raw} has numbers that are not finite"]
    report.loaded += 1
    return []


def copy_finite(target: Tensor, source: Tensor, flip: bool = False) -> bool:
    """Copies a tensor, or its transpose, and tells whether all its numbers are finite.

    Large ones part by part, while they are in the cache: looking at all of it again would cost a tenth of loading.
    """
    rows, found = max(1, IN_CACHE // max(1, math.prod(target.shape[1:]))), 0.0
    if flip:
        found = total(source)
        target.copy_(source.t())
    elif len(target) <= rows:
        found = total(source)
        target.copy_(source)
    else:
        for to, part in zip(target.split(rows), source.split(rows), strict=True):
            found += total(part)
            to.copy_(part)
    return math.isfinite(found) or bool(target.isfinite().all())  # a sum may overflow by itself


def total(tensor: Tensor) -> float:
    """The sum of a tensor's numbers, which is not finite where one of them is not."""
    return tensor.sum(dtype=torch.float32).item()


def is_transposed(model: Model, hub: str) -> bool:
    """Whether the hub keeps this tensor as (in, out)."""
    return hub.endswith(model.family.TRANSPOSED)


def hub_names(model: Model) -> dict[str, str]:
    """Our name -> the hub's, for every weight and bias with a tensor of its own in a file."""
    tied, modules = model.head.tied[0] if model.tied else None, model.named_modules()
    found = (
        f"{n}.{leaf}" for n, m in modules for leaf in ("weight", "bias") if isinstance(getattr(m, leaf, None), Tensor)
    )
    return {name: model.hub_name(name) for name in found if name != tied}


def known_name(name: str, known: dict, prefix: str) -> tuple[str, str]:
    """(a file's name for a tensor as transformers would write it today, what a wrapper had put before it).

    Today there is no gamma and beta, and the body's prefix.
    """
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    before = "" if name in known else re.match(WRAPPERS, name)[0]
    name = name.removeprefix(before)
    return prefix + name if prefix + name in known else name, before


def is_packed(shape: tuple, codes: Tensor) -> bool:
    """Whether a weight of the file has the shape of `codes`, kept as numbers of 1, 2 or 4 bytes (quant_storage)."""
    return len(shape) == 2 and shape[1] == 1 and any(shape[0] * size == len(codes) for size in (1, 2, 4))


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the parameter called `name`."""
    path, leaf = name.rpartition(".")[::2]
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def draw(model: Model, seed: int) -> None:
    """Draws what is still without memory, in the model's order from one generator (as transformers after set_seed)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(model.named_parameters()):
        if p.is_meta and name.endswith("weight") and p.dim() > 1:
            put(
                model,
                name,
                torch.empty(p.shape).normal_(0, model.family.init_scale(model.config, name), generator=generator),
            )
        elif p.is_meta:  # biases 0, layer norms 1
            put(model, name, torch.full(p.shape, float(name.endswith("weight"))))


def tensors(folder: Path) -> Iterator[tuple[str, tuple, Callable[[], Tensor]]]:
    """(name, shape, function that reads it) of every tensor of a checkpoint, without reading it yet."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        yield from (safetensors_in if path.suffix == ".safetensors" else pickled_in)(path)
        return
    index = read_index(path)
    for shard in sorted(set(index.values())):
        if not (folder / shard).is_file():
            raise InputError(f"{path}: names the file {shard}, which is not there")
        expected = {name for name, file in index.items() if file == shard}
        found = set()
        for tensor in (safetensors_in if shard.endswith(".safetensors") else pickled_in)(folder / shard):
            found.add(tensor[0])
            yield tensor
        if different := expected ^ found:
            raise InputError(
                f"{folder / shard}: does not hold what {path.name} says; different: {', '.join(sorted(different)[:5])}"
            )


def read_index(path: Path) -> dict[str, str]:
    """tensor name -> file name of a sharded checkpoint. Refuses files outside its folder."""
    content = parse_json(path.read_bytes(), path)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict):
        raise InputError(f"{path}: not an index of shards; expected an object with weight_map")
    for name, shard in index.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            raise InputError(f"{path}: puts {name} into {short(shard)}; expected a weight file in the same folder")
    return index


def safetensors_in(path: Path) -> Iterator[tuple[str, tuple, Callable[[], Tensor]]]:
    """The tensors of a .safetensors file, mapped; the memory of one is given back before the next."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        check_pointer(path)
        raise InputError(
            f"{path}: not a whole safetensors file ({e}); its size is {path.stat().st_size:,} bytes"
        ) from e
    place = None
    with file:
        for name in file.keys():
            found = []

            def read(name: str = name, found: list = found) -> Tensor:
                found.append(file.get_tensor(name))
                return found[0]

            yield name, tuple(file.get_slice(name).get_shape()), read
            for tensor in found:
                place = native.mapping(tensor) if place is None else place
                native.forget(tensor, place)


def check_pointer(path: Path) -> None:
    """Raises InputError where git has left a note of the file in its place."""
    with open(path, "rb") as f:
        if f.read(24) == b"version https://git-lfs.":
            raise InputError(f"{path}: a pointer of git-lfs, and not the file; expected the file (`git lfs pull`)")


def pickled_in(path: Path) -> Iterator[tuple[str, tuple, Callable[[], Tensor]]]:
    """The tensors of a pytorch_model.bin. Only tensors are unpickled: a file that would run code is refused."""
    check_pointer(path)
    with open(path, "rb") as f:
        zipped = f.read(2) == b"PK"  # an old-style pickle cannot be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError, zip errors: torch's own words say which
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{path}: not a checkpoint of tensors alone, or not whole ({reason})") from e
    key = next((key for key in ("state_dict", "model_state_dict", "model") if is_dict_in(state, key)), "")
    if key:  # a trainer's, with more beside it
        state = {f"{key}.{name}": tensor for name, tensor in state[key].items()}
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; expected named tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {short(name)} is of type {type(tensor).__name__}; expected named tensors")
        if not is_plain(tensor):
            kind = "without content" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise InputError(f"{path}: {name} is a tensor {kind}; expected plain ones, each with all its numbers")
    for name, tensor in state.items():
        yield name, tuple(tensor.shape), lambda tensor=tensor: tensor


def is_dict_in(state: object, key: str) -> bool:
    """Whether `state` is a dictionary with another one under `key`."""
    return isinstance(state, dict) and isinstance(state.get(key), dict)


def is_plain(tensor: Tensor) -> bool:
    """Whether each of a tensor's numbers is in memory."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


# saving


def save(model: Model, tokenizer: Tokenizer | None, folder: str | Path) -> None:
    """Writes a folder that minift and transformers load: config.json, model.safetensors, the tokenizer's files.

    Of a model with an adapter, the adapter alone: a PEFT folder, with config.json and the tokenizer's files beside
    it. Layers in four bits are written as bitsandbytes writes them. minift.json lists what was written.
    An older model that minift saved there is replaced, and everything else in the folder stays. Raises InputError
    where a file that minift did not write would be replaced, OSError on a full disk.
    """
    folder = Path(folder)
    weights = peft_format.WEIGHTS if model.adapter else MODEL
    tokenizer_files = tokenizer.files if tokenizer else ()
    check_folder(folder, {weights, "config.json", *([peft_format.CONFIG] if model.adapter else ()), *tokenizer_files})
    write_model(model, tokenizer, folder)


def write_model(model: Model, tokenizer: Tokenizer | None, folder: Path, write: bool = True) -> None:
    """What `save` writes, over whatever has these names: for a run's own folders.

    write: whether this process does; of a sharded model, all have to give their parts.
    """
    if model.adapter:
        parameters = peft_format.tensors(model)
        state = {name: whole(p.detach()).cpu().contiguous() for name, p in parameters.items()}
        weights, texts = peft_format.WEIGHTS, {peft_format.CONFIG: peft_format.settings(model)}
    else:
        state, weights, texts = weights_of(model), MODEL, {}
    texts["config.json"] = settings_of(model)

    def put_files(aside: Path) -> None:
        for name, content in texts.items():
            (aside / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(state, aside / weights, metadata={"format": "pt"})
        if tokenizer:
            tokenizer.save(aside)

    if not write:
        return
    try:
        write_folder(folder, put_files)
    except (OSError, SafetensorError) as e:
        raise OSError(f"{folder}: the model could not be written ({e}); what was there before is whole") from e


def save_base(model: Model, tokenizer: Tokenizer | None, folder: Path, write: bool = True) -> None:
    """Saves the frozen model under an adapter, and makes its folder the adapter's base."""
    adapter, model.adapter, layers = model.adapter, None, wrappers(model)
    for name, layer in layers.items():
        replace_module(model, name, layer.frozen)
    write_model(model, tokenizer, folder, write)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    model.adapter = replace(adapter, base=address(folder))


def weights_of(model: Model) -> dict[str, Tensor]:
    """The tensors of model.safetensors."""
    state = {}
    for name, hub in hub_names(model).items():
        tensor = whole(get(model, name).detach())
        packed = can_pack(model, name)
        state[hub] = (tensor.t() if is_transposed(model, hub) and not packed else tensor).contiguous().cpu()
        if packed:
            parts = model.get_submodule(name.removesuffix(".weight")).parts()
            state |= {f"{hub}.{part}": tensor.clone().cpu() for part, tensor in parts.items()}
    return state


def settings_of(model: Model) -> dict:
    """config.json: the checkpoint's own, with the architecture and labels of this model."""
    settings = {k: v for k, v in model.settings.items() if k not in ("_name_or_path", "torch_dtype", "num_labels")}
    settings |= {
        "architectures": [model.head.architecture if model.head else model.family.ARCHITECTURE],
        "dtype": "float32",
    }
    if model.task == "classify":
        settings |= {
            "id2label": {str(i): name for i, name in enumerate(model.labels)},
            "label2id": {name: i for i, name in enumerate(model.labels)},
            "problem_type": "single_label_classification",
        }
        if settings.get("pad_token_id") is None:  # transformers wants one to find the last token of a padded batch
            settings["pad_token_id"] = settings.get("eos_token_id")
    packed = [name for name, m in model.named_modules() if isinstance(m, NF4Linear)]
    if packed and model.adapter:  # the base is packed as it is loaded
        settings["minift"] = settings.get("minift", {}) | {"base": "nf4"}
    elif packed:
        skipped = [
            model.hub_name(n) for n in ("head.pooler", "head.out") if n not in packed and hasattr(model.head, n[5:])
        ]
        settings["quantization_config"] = quantization_config(skipped)
    return settings
