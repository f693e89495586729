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
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import tokenizer as tokenizers
from .adapters import peft_format
from .adapters.lora import put as replace_module
from .adapters.lora import wrappers
from .config import InputError, printable
from .distributed import whole
from .layers import Linear
from .models import FAMILIES, Model
from .ops import native
from .quantize import PARTS, STATE, NF4Linear, linears, quantization_config, swap
from .tokenizer import Tokenizer

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


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
        return "\n".join(lines)


def load(
    source: str | Path,
    task: str | None = None,
    labels: list[str] | None = None,
    *,
    base: str = "",
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
    fresh_head: whether a missing head may be drawn at random (to be trained), else that is an error.
    dropout: one rate for all places; -1 keeps the config's. seed: of fresh weights.
    Raises InputError. What was loaded, drawn and left out is in model.report.
    """
    given = folder = resolve(source)
    is_adapter = (given / peft_format.CONFIG).is_file()
    if is_adapter:
        adapter, kind = peft_format.read_config(given)
        if not adapter.base:
            raise InputError(f"{given / peft_format.CONFIG}: no base_model_name_or_path; expected the model to adapt")
        task, folder = task or kind, resolve(adapter.base)
    settings = read_settings(folder)
    if is_adapter and (given / "config.json").is_file():  # a run's; the shape of the model is its base's affair
        of_run = read_settings(given)
        settings |= {key: of_run[key] for key in ("id2label", "label2id", "pad_token_id", "minift") if key in of_run}
    packed = settings.get("minift", {}).pop("base", "")  # how the run kept its base
    classes = choose_classes(own_labels(settings), labels, ordered) if task == "classify" else Classes(labels)
    fresh_classes = classes.fresh and not is_adapter  # an adapter's head is first read as it is
    model = build(settings, folder, task, classes.first_rows(is_adapter), dropout)
    prepare(model, folder, base or packed)
    if fresh_classes:
        model.head.out = on_meta(model.head.out, len(classes.rows))  # though the file has it in four bits
    with native.returned_memory():
        model.report = fill(model, folder, fresh_head or is_adapter, seed, fresh_classes)
        model.source = address(source)
    if model.task and isinstance(model.head.out, NF4Linear):
        model.head.out = unpacked(
            model.head.out
        )  # which transformers packs too; a head's numbers are looked at, and learn
    if is_adapter:
        peft_format.load(model, given)
        if model.report.fresh and not fresh_head:
            raise InputError(f"{given}: neither it nor {folder} has a trained {', '.join(model.report.fresh)}")
    if task == "classify":
        settle_classes(model, classes, seed)
        if model.report.relabelled and not fresh_head:
            raise InputError(f"{given}: its classes are {own_labels(settings)}; expected a head trained for {labels}")
    found = next((place for place in (given, folder) if any((place / n).is_file() for n in tokenizers.FILES)), None)
    tokenizer = tokenizers.load(found) if found else None
    if tokenizer and tokenizer.vocab_size > model.config.vocabulary:
        raise InputError(
            f"{found}: the tokenizer has ids up to {tokenizer.vocab_size - 1}; expected below "
            f"{model.config.vocabulary}, the rows of the model's embedding"
        )
    return model.to(device), tokenizer


# where the files are


def resolve(source: str | Path) -> Path:
    """The folder with a model's files: `source` itself, the best or last model of a run folder, or the hub's cache."""
    folder = Path(source)
    if folder.is_dir():
        return next((folder / name for name in ("best", "last") if (folder / name / "config.json").is_file()), folder)
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1 or folder.exists():
        raise InputError(f"{source}: no such folder")
    return download(str(source))


def address(source: str | Path) -> str:
    """How another folder's files name a model: the whole path of a local one, or its hub id."""
    return str(resolve(source).resolve()) if Path(source).is_dir() else str(source)


def download(repo: str) -> Path:
    """The hub's files of `repo` (an id such as bert-base-uncased or user/model), in huggingface-hub's cache."""

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:  # the hub is out of reach, and the file not in the cache
            return None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError) as e:
            raise InputError(f"{repo}: no such folder, and the hub says: {str(e).strip().splitlines()[-1]}") from e

    config = fetch(peft_format.CONFIG)
    if config is not None:
        fetch(peft_format.WEIGHTS)
    config = fetch("config.json") or config
    if config is None:
        raise InputError(
            f"{repo}: no such folder, and no config.json of it on the hub or, if the hub is out of reach, in its cache"
        )
    for name in tokenizers.FILES:
        fetch(name)
    weights = next((path for path in map(fetch, WEIGHT_FILES) if path), None)
    if weights and weights.suffix == ".json":
        for shard in set(read_index(weights).values()):
            fetch(shard)
    return config.parent


def read_settings(folder: Path) -> dict:
    """The model's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; expected a model folder as transformers writes it")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from e
    if not isinstance(settings, dict) or settings.get("model_type") not in FAMILIES:
        found = settings.get("model_type") if isinstance(settings, dict) else type(settings).__name__
        raise InputError(f"{path}: model_type is {found!r}; expected one of {', '.join(FAMILIES)}")
    return settings


# the model without memory


def build(settings: dict, folder: Path, task: str | None, labels: list[str] | None, dropout: float) -> Model:
    """The model on the meta device."""
    family = FAMILIES[settings["model_type"]]
    known = {f.name: settings[f.name] for f in fields(family.Config) if f.name in settings}
    try:
        config = family.Config(**known)
    except (ValueError, TypeError) as e:
        raise InputError(f"{folder / 'config.json'}: {e}") from e
    if dropout >= 0:
        config = replace(config, **config.with_dropout(dropout))
    if task and task not in family.HEADS:
        raise InputError(
            f"{folder}: {settings['model_type']} has no head for {task}; expected one of {', '.join(family.HEADS)}"
        )
    with torch.device("meta"):
        return Model(settings, config, task, own_labels(settings) if labels is None else labels)


def prepare(model: Model, folder: Path, base: str) -> None:
    """Puts NF4Linears where weights are to be packed (base "nf4"), or are packed in the file."""
    packed = read_settings(folder).get("quantization_config") or {}
    if packed and (packed.get("quant_method"), packed.get("bnb_4bit_quant_type")) != ("bitsandbytes", "nf4"):
        raise InputError(
            f"{folder / 'config.json'}: quantization_config is {packed}; expected bitsandbytes' nf4, or none"
        )
    model.settings = {k: v for k, v in model.settings.items() if k != "quantization_config"}
    layers = {name for name, _ in linears(model)} if base == "nf4" else set()
    if packed:
        ours = {hub: name for name, hub in hub_names(model).items()}
        for raw, *_ in tensors(folder):
            weight, is_state, _ = raw.partition(f".{STATE}")
            name = ours.get(modern(weight, ours, model.family.PREFIX))
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


def own_labels(settings: dict) -> list[str]:
    """The names of the checkpoint's classes."""
    by_id = settings.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [by_id[key] for key in sorted(by_id, key=int)]


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
    for raw, shape, read in tensors(folder):
        weight, part = split_part(raw)
        hub = modern(weight, ours, model.family.PREFIX)
        if hub in ours and fresh_classes and ours[hub].startswith("head.out."):
            report.relabelled += [] if hub in report.relabelled else [hub]
            continue
        if hub in ours and not part and can_pack(model, ours[hub]) and shape == tuple(get(model, ours[hub]).shape):
            part = "weight"
        if hub in ours and part:
            packed.setdefault(hub, {})[part] = read()
        elif hub in ours:
            faults += place(model, ours[hub], hub, raw, shape, read, report)
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
    known = (*report.reshaped, *report.relabelled, *packed)
    missing = [n for n in names if get(model, n).is_meta and names[n] not in known]
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
    return report


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


def place(model: Model, name: str, hub: str, raw: str, shape: tuple, read: Callable, report: Report) -> list[str]:
    """Puts one tensor of the file where it belongs; returns what is wrong with it, if anything."""
    layer, flip, pack = model.get_submodule(name.rpartition(".")[0]), is_transposed(model, hub), can_pack(model, name)
    want = (layer.out_features, layer.in_features) if pack else tuple(get(model, name).shape)
    want = want[::-1] if flip else want
    if not get(model, name).is_meta:
        return [f"{hub} is in the file twice, the second time as {raw}"]
    if shape != want and name.startswith("head.out."):
        report.reshaped.append(hub)
        return []
    if shape != want:
        return [f"{raw} is {shape} in the file; expected {want}"]
    tensor = read()
    if not tensor.is_floating_point():
        return [f"{raw} is {tensor.dtype} in the file; expected floating-point numbers"]
    tensor = tensor.t() if flip else tensor
    if pack:
        layer.pack(tensor)
    else:
        put(model, name, torch.empty(want[::-1] if flip else want).copy_(tensor))
    report.loaded += 1
    return []


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


def modern(name: str, known: dict, prefix: str) -> str:
    """A file's name for a tensor, as transformers would write it today: no gamma and beta, with the body's prefix."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return prefix + name if prefix + name in known else name


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
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        for name, shard in index.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
                raise InputError(f"{path}: puts {name} into {shard!r}; expected a weight file in the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"{path}: not an index of shards ({type(e).__name__}: {e}); expected an object with weight_map"
        ) from e
    return index


def safetensors_in(path: Path) -> Iterator[tuple[str, tuple, Callable[[], Tensor]]]:
    """The tensors of a .safetensors file, mapped; the memory of one is given back before the next."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
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


def pickled_in(path: Path) -> Iterator[tuple[str, tuple, Callable[[], Tensor]]]:
    """The tensors of a pytorch_model.bin. Only tensors are unpickled: a file that would run code is refused."""
    with open(path, "rb") as f:
        zipped = f.read(2) == b"PK"  # an old-style pickle cannot be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError, zip errors: torch's own words say which
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{path}: not a checkpoint of tensors alone, or not whole ({reason})") from e
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path}: holds something else than named tensors")
    for name, tensor in state.items():
        yield name, tuple(tensor.shape), lambda tensor=tensor: tensor


# saving


def save(model: Model, tokenizer: Tokenizer | None, folder: str | Path, write: bool = True) -> None:
    """Writes a folder that minift and transformers load: config.json, model.safetensors, the tokenizer's files.

    Of a model with an adapter, the adapter alone: a PEFT folder, with config.json and the tokenizer's files beside
    it. Layers in four bits are written as bitsandbytes writes them.
    It is written aside and renamed, so that `folder` is never half a model. An older model there is replaced; raises
    InputError where something else is.
    write: whether this process does; of a sharded model, all have to give their parts.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: holds something else than a model; expected a new folder, or an older model")
    if model.adapter:
        parameters = peft_format.tensors(model)
        state = {name: whole(p.detach()).cpu().contiguous() for name, p in parameters.items()}
        weights, texts = peft_format.WEIGHTS, {peft_format.CONFIG: peft_format.settings(model)}
    else:
        state, weights, texts = weights_of(model), "model.safetensors", {}
    if write:
        write_folder(folder, texts | {"config.json": settings_of(model)}, weights, state, tokenizer)


def save_base(model: Model, tokenizer: Tokenizer | None, folder: Path, write: bool = True) -> None:
    """Saves the frozen model under an adapter, and makes its folder the adapter's base."""
    adapter, model.adapter, layers = model.adapter, None, wrappers(model)
    for name, layer in layers.items():
        replace_module(model, name, layer.frozen)
    save(model, tokenizer, folder, write)
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


def write_folder(folder: Path, texts: dict[str, dict], weights: str, state: dict, tokenizer: Tokenizer | None) -> None:
    """A folder of JSON files, one of tensors and a tokenizer's, complete or not at all. Raises OSError (disk full)."""
    aside, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for path in (aside, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, content in texts.items():
            (aside / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        save_file(state, aside / weights, metadata={"format": "pt"})
        if tokenizer:
            tokenizer.save(aside)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{folder}: the model could not be written ({e}); what was there before is whole") from e
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


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
