"""The tensors of a checkpoint -> the parameters of a model, streamed; a strict report of what does not fit.

What the file lacks and may lack (a new task's head) is drawn at random. Everything else that does not fit is an error
that names the tensor. Loading never takes more than the result and one tensor, and afterwards the file may go.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..config import parse_json
from ..engine import memory
from ..errors import InputError, short_repr
from ..layers.packed import PackedLinear, part_of
from ..models import LAST, Model, is_last

MODEL = "model.safetensors"
WEIGHT_FILES = (MODEL, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPERS = r"(?:(?:state_dict|model_state_dict|module|model|_orig_mod|_fsdp_wrapped_module)\.)*"  # before names
IN_CACHE = 1 << 18  # numbers: what is copied at once, so that looking at it again costs little


class Stored(NamedTuple):
    """A tensor in a checkpoint's file, not yet read."""

    name: str
    shape: tuple
    read: Callable[[], Tensor]


@dataclass
class Report:
    """What loading met, in the hub's names."""

    loaded: int = 0
    adapter: int = 0  # tensors of an adapter, put around them
    fresh: list[str] = field(default_factory=list)  # missing in the file, drawn at random
    reshaped: list[str] = field(default_factory=list)  # of another shape there (of other labels), drawn at random
    relabelled: list[str] = field(default_factory=list)  # of other classes in the file, drawn at random
    labels: str = ""  # what became of the checkpoint's classes, where that is worth a word
    unused: list[str] = field(default_factory=list)  # in the file, for another task
    notes: list[str] = field(default_factory=list)  # what else was unusual and how it was taken, a sentence each

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors loaded"]
        if self.adapter:
            lines[0] += f", {self.adapter} of an adapter"
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


def fill(model: Model, folder: Path, fresh_head: bool, seed: int, fresh_classes: bool = False) -> Report:
    """Streams the checkpoint into the model, draws what may be missing, and says so. Raises InputError.

    fresh_classes: whether the last layer of the head is drawn though the file has one, of other classes.
    """
    names = hub_names(model)
    report = Report()
    layers = dict(model.named_modules())  # looked up by name, each, they would take longer than small tensors
    packed, second, faults = take_tensors(model, folder, layers, fresh_classes, report)

    # a packed weight is several tensors, which its layer takes together
    for name, parts in packed.items():
        fault = "is packed, which config.json says nothing of (quantization_config)"
        if can_pack(layers, name):
            fault = layer_of(layers, name).receive(parts)
        if fault:
            faults.append(f"{names[name]} {fault}")
        report.loaded += 1

    # a tied head that was saved once, under its own name (safetensors' save_model), is the embedding
    if second and leaf_of(layers, model.head.tied[1]).is_meta:
        for stored in tensors(folder):
            if stored.name == second:
                faults += place(model, layers, model.head.tied[1], stored, report)
        second = ""

    drawn = {*report.reshaped, *report.relabelled, *(names[name] for name in packed)}
    missing = [name for name, hub in names.items() if hub not in drawn and leaf_of(layers, name).is_meta]
    report.fresh = [names[name] for name in missing if name.startswith("head.")]
    model.fresh = sorted({hub.rpartition(".")[0] for hub in report.fresh})
    faults += [f"{names[name]} is missing in the file" for name in missing if not name.startswith("head.")]
    if not fresh_head:
        fault = f"of the {model.task} head, is missing or of another shape; expected a trained head"
        faults += [f"{hub}, {fault}" for hub in report.fresh + report.reshaped]
    if faults:
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise InputError(f"{folder}: the weights do not fit the model:\n  " + "\n  ".join(faults[:20]) + more)

    draw(model, seed)
    model.tie()
    if second:
        untie_where_different(model, folder, second, report)
    return report


def draw_all(model: Model, seed: int) -> Report:
    """Draws every weight of a model, and says so."""
    draw(model, seed)
    model.tie()
    return Report(notes=["every weight is drawn at random"])


def take_tensors(
    model: Model, folder: Path, layers: dict[str, nn.Module], fresh_classes: bool, report: Report
) -> tuple[dict[str, dict[str, Tensor]], str, list[str]]:
    """Puts every tensor of the checkpoint where it belongs, one after the other; notes in the report what is left out.

    layers: the model's modules by name. Returns (the parts of weights that are packed in the file, by our name
    of the weight; what the file calls a tied head that it has too, or ""; what is wrong).
    """
    ours = {hub: name for name, hub in hub_names(model).items()}
    tied = model.hub_name(model.head.tied[0]) if model.tied else ""
    idle = ""
    if model.bias_twin and has_tensor(model, folder, ours, model.bias_twin):
        idle = model.hub_name(f"{LAST}.bias")  # the other of the two is read
        ours[model.bias_twin] = ours.pop(idle)
    packed: dict[str, dict[str, Tensor]] = {}
    wrappers: set[str] = set()  # what stands before the names
    second = ""
    faults = []
    for stored in tensors(folder):
        weight, part = part_of(stored.name)
        hub, before = known_name(weight, ours, model.family.PREFIX)
        wrappers.add(before)
        name = ours.get(hub, "")
        if name and fresh_classes and is_last(name):
            if hub not in report.relabelled:
                report.relabelled.append(hub)
            continue

        # codes have the weight's name; their other parts have names of their own
        if name and not part and can_pack(layers, name) and layer_of(layers, name).are_codes(stored.shape):
            part = "weight"
        if name and part:
            packed.setdefault(name, {})[part] = stored.read()
        elif hub == tied:
            second = stored.name  # compared when the embedding is there, or the only one of the two that is
        elif name:
            faults += place(model, layers, name, stored, report)
        elif hub == idle:
            continue
        elif re.fullmatch(model.family.OTHER_HEADS, hub):
            report.unused.append(hub)
        elif not re.fullmatch(model.family.IGNORED, hub):
            faults.append(f"{stored.name} {stored.shape} is in the file, but not in the model")
    for before in sorted(wrappers - {""}):
        report.notes.append(f"names in the file begin with {before}, which was taken off")
    return packed, second, faults


def has_tensor(model: Model, folder: Path, known: dict, hub: str) -> bool:
    """Whether a checkpoint has a tensor that the hub calls `hub`, whatever a wrapper put before its name."""
    return any(known_name(stored.name, known, model.family.PREFIX)[0] == hub for stored in tensors(folder))


def untie_where_different(model: Model, folder: Path, raw: str, report: Report) -> None:
    """Gives a tied head the weight `raw` of the file, unless it is the embedding's: as transformers does."""
    tensor = next(stored.read() for stored in tensors(folder) if stored.name == raw)
    embedding = model.head.out.weight
    if tensor.shape != embedding.shape or not tensor.is_floating_point():
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise InputError(f"{folder}: {raw} is {found} in the file; expected {tuple(embedding.shape)}, floating-point")
    if not torch.equal(tensor.float(), embedding):
        model.untie()
        with torch.no_grad():
            is_whole = copy_finite(model.head.out.weight, tensor)
        if not is_whole:
            raise InputError(f"{folder}: {raw} has numbers that are not finite")
        report.loaded += 1
        why = "though config.json ties the two (tie_word_embeddings)"
        report.notes.append(f"{raw} is not the word embedding, {why}: both are used")


def can_pack(layers: dict[str, nn.Module], name: str) -> bool:
    """Whether `name` is the weight of a layer that packs it."""
    return name.endswith(".weight") and isinstance(layer_of(layers, name), PackedLinear)


def layer_of(layers: dict[str, nn.Module], name: str) -> nn.Module:
    """The layer whose weight is called `name`."""
    return layers[name.removesuffix(".weight")]


def leaf_of(layers: dict[str, nn.Module], name: str) -> Tensor:
    """The parameter or buffer called `name` of a model with these modules."""
    path, _, leaf = name.rpartition(".")
    return getattr(layers[path], leaf)


def place(model: Model, layers: dict[str, nn.Module], name: str, stored: Stored, report: Report) -> list[str]:
    """Puts one tensor of the file where it belongs, which is called `name`; returns what is wrong with it, if anything.

    layers: the model's modules by name.
    """
    path, _, leaf = name.rpartition(".")
    layer = layers[path]
    now = getattr(layer, leaf)
    pack = can_pack(layers, name)
    hub = model.hub_name(name)
    flip = is_transposed(model, hub)
    shape = (layer.out_features, layer.in_features) if pack else tuple(now.shape)
    want = shape[::-1] if flip else shape  # in the file
    if not now.is_meta:
        return [f"{hub} is in the file twice, the second time as {stored.name}"]
    if stored.shape != want and is_last(name):
        report.reshaped.append(hub)
        return []
    if stored.shape != want:
        return [f"{stored.name} is {stored.shape} in the file; expected {want}"]
    tensor = stored.read()
    if not tensor.is_floating_point():
        return [f"{stored.name} is {tensor.dtype} in the file; expected floating-point numbers"]
    if pack:
        is_whole = is_finite(tensor)
        layer.pack(tensor.t() if flip else tensor)
    else:
        ours = torch.empty(shape)
        is_whole = copy_finite(ours, tensor, flip)
        setattr(layer, leaf, nn.Parameter(ours))
    if not is_whole:
        return [f"{stored.name} has numbers that are not finite"]
    report.loaded += 1
    return []


def copy_finite(target: Tensor, source: Tensor, flip: bool = False) -> bool:
    """Copies a tensor, or its transpose, and tells whether all its numbers are finite.

    Large ones part by part, while they are in the cache: looking at all of it again would cost a tenth of loading.
    """
    if flip:
        target.copy_(source.t())
        return is_finite(target)
    rows = max(1, IN_CACHE // max(1, math.prod(target.shape[1:])))
    found = True
    for to, part in zip(target.split(rows), source.split(rows), strict=True):
        to.copy_(part)
        found = is_finite(to) and found
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite: their sum is, in one pass, unless it overflows by itself."""
    if math.isfinite(tensor.sum(dtype=torch.float32).item()):
        return True
    if tensor.itemsize == 1:  # float8, for which torch has no isfinite
        tensor = tensor.float()
    return bool(tensor.isfinite().all())


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


def draw(model: Model, seed: int) -> None:
    """Draws what is still without memory, in the model's order from one generator (as transformers after set_seed)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in list(model.named_parameters()):
        if not p.is_meta:
            continue
        tensor = torch.full(p.shape, float(name.endswith("weight")))  # biases 0, layer norms 1
        if name.endswith("weight") and p.dim() > 1:
            tensor.normal_(0, model.family.init_scale(model.config, name), generator=generator)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def tensors(folder: Path) -> Iterator[Stored]:
    """Every tensor of a checkpoint, without reading it yet."""
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if path.suffix != ".json":
        yield from tensors_in(path)
        return
    index = read_index(path)
    for shard in sorted(set(index.values())):
        if not (folder / shard).is_file():
            raise InputError(f"{path}: names the file {shard}, which is not there")
        expected = {name for name, file in index.items() if file == shard}
        found = set()
        for tensor in tensors_in(folder / shard):
            found.add(tensor.name)
            yield tensor
        if different := expected ^ found:
            shown = ", ".join(sorted(different)[:5])
            raise InputError(f"{folder / shard}: does not hold what {path.name} says; different: {shown}")


def read_index(path: Path) -> dict[str, str]:
    """tensor name -> file name of a sharded checkpoint. Refuses files outside its folder."""
    content = parse_json(path.read_bytes(), path)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict):
        raise InputError(f"{path}: not an index of shards; expected an object with weight_map")
    for name, shard in index.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
            raise InputError(f"{path}: puts {name} into {short_repr(shard)}; expected a weight file in the same folder")
    return index


def tensors_in(path: Path) -> Iterator[Stored]:
    """The tensors of one file, by the kind that its name ends in."""
    return safetensors_in(path) if path.suffix == ".safetensors" else pickled_in(path)


def safetensors_in(path: Path) -> Iterator[Stored]:
    """The tensors of a .safetensors file, mapped; the memory of one is given back before the next."""
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        check_pointer(path)
        size = f"{path.stat().st_size:,} bytes"
        raise InputError(f"{path}: not a whole safetensors file ({e}); its size is {size}") from e
    place = None
    with file:
        for name in file.keys():
            found = []

            def read(name: str = name, found: list = found) -> Tensor:
                found.append(file.get_tensor(name))
                return found[0]

            yield Stored(name, tuple(file.get_slice(name).get_shape()), read)
            for tensor in found:
                place = memory.mapping(tensor) if place is None else place
                memory.forget(tensor, place)


def check_pointer(path: Path) -> None:
    """Raises InputError where git has left a note of the file in its place."""
    with open(path, "rb") as f:
        if f.read(24) == b"version https://git-lfs.":
            raise InputError(f"{path}: a pointer of git-lfs, and not the file; expected the file (`git lfs pull`)")


def pickled_in(path: Path) -> Iterator[Stored]:
    """The tensors of a pytorch_model.bin. Only tensors are unpickled: a file that would run code is refused."""
    check_pointer(path)
    with open(path, "rb") as f:
        zipped = f.read(2) == b"PK"  # an old-style pickle cannot be mapped
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # UnpicklingError, RuntimeError, EOFError, zip errors: torch's own words say which
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"{path}: not a checkpoint of tensors alone, or not whole ({reason})") from e
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; expected named tensors")
    key = next((key for key in ("state_dict", "model_state_dict", "model") if isinstance(state.get(key), dict)), "")
    if key:  # a trainer's, with more beside it
        state = {f"{key}.{name}": tensor for name, tensor in state[key].items()}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: {short_repr(name)} is of type {type(tensor).__name__}; expected named tensors")
        if not is_plain(tensor):
            kind = "without content" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise InputError(f"{path}: {name} is a tensor {kind}; expected plain ones, each with all its numbers")
    for name, tensor in state.items():
        yield Stored(name, tuple(tensor.shape), lambda tensor=tensor: tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether each of a tensor's numbers is in memory."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()
