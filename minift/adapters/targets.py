"""Which layers an adapter wraps: by the names and matching rules that PEFT uses, so that its files mean the same here.

Layers are named by a tuple, one of which their hub name is or ends in after a dot, or by a regular expression for all
of it. Patterns of `rank_pattern` and `alpha_pattern` are regular expressions for the end of a name.
"""

import re

from torch import nn

from ..errors import InputError
from ..models import LAST

Names = str | tuple[str, ...]  # of layers: a regular expression, or some names


def candidates(model: nn.Module) -> dict[str, str]:
    """Our name -> the hub's of every layer that an adapter can wrap: all linear ones but the head's last."""
    return {
        name: model.hub_name(name)
        for name, module in model.named_modules()
        if hasattr(module, "matrix") and hasattr(module, "in_features") and name != LAST
    }


def select(
    model: nn.Module, targets: Names, exclude: Names, layers: tuple[int, ...], within: tuple[str, ...]
) -> list[str]:
    """The hub names of the layers that are meant, in the model's order. Raises InputError where none is.

    targets: names, a regular expression, or "all-linear"; exclude: which of them not.
    layers: only transformer layers of these numbers. within: modules that learn as they are, whose layers are left out.
    """
    check_pattern("targets", targets)
    check_pattern("exclude", exclude)
    free = [hub for hub in candidates(model).values() if not is_within(hub, within)]
    found = []
    for hub in free:
        name = name_in(model, hub)
        if exclude and is_named(name, exclude):
            continue
        if layers and number(hub) not in layers:
            continue
        if targets == "all-linear" or is_named(name, targets):
            found.append(hub)
    if not found:
        kinds = "\n  ".join(sorted({re.sub(r"\.\d+\.", ".N.", hub) for hub in free}))
        of_layers = f", in layers {', '.join(map(str, layers))}" if layers else ""
        raise InputError(f"targets {targets!r}{of_layers}: no layer has such a name; there are:\n  {kinds}")
    return found


def roles(model: nn.Module, *parts: str) -> tuple[str, ...]:
    """What the hub calls the layers with these roles ("query", "value", ...), each once."""
    return tuple(dict.fromkeys(model.family.ROLES[part] for part in parts))


def name_in(model: nn.Module, hub: str) -> str:
    """The hub's name as it is in this model, for transformers and PEFT: a body without a head has no prefix."""
    return hub if model.head else hub.removeprefix(model.family.PREFIX)


def names(text: Names) -> Names:
    """Names with commas between as a tuple; "all-linear" and a regular expression (it has other signs) as they are."""
    if not isinstance(text, str) or not re.fullmatch(r"[\w.,]*", text):
        return text
    return tuple(name for name in text.split(",") if name)


def is_named(hub: str, wanted: Names) -> bool:
    """Whether a layer's name is meant by targets."""
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, hub))
    return any(hub == name or hub.endswith("." + name) for name in wanted)


def by_pattern(patterns: dict, hub: str, default):
    """The value of the first pattern that the end of a name fits."""
    return next((value for key, value in patterns.items() if re.match(end_of(key), hub)), default)


def end_of(key: str) -> str:
    """The regular expression for names of which `key` fits the end."""
    return rf"(?:.*\.)?(?:{key})$"


def is_within(hub: str, modules: tuple[str, ...]) -> bool:
    """Whether a name ends in one of `modules`, or is inside one. As in PEFT, `pre_classifier` ends in `classifier`."""
    return any(re.match(rf".*{re.escape(m)}(?:$|\.)", hub) for m in modules)


def number(hub: str) -> int | None:
    """The number of the transformer layer that a name belongs to."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", hub)
    return int(found[1]) if found else None


def check_pattern(option: str, pattern: Names, at_end: bool = False) -> None:
    """Raises InputError where a string is no regular expression; at_end: one for the end of a name."""
    if not isinstance(pattern, str):
        return
    try:
        re.compile(end_of(pattern) if at_end else pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise InputError(f"{option} is {pattern!r}: not a regular expression ({e})") from e


# the head beside adapters


def default_saved(model: nn.Module) -> tuple[str, ...]:
    """Modules of the head to train in full, if it learns: its last layer, and what had no weights in the checkpoint.

    Where the hub's head is a module of several layers, all of it, since PEFT trains what is called `classifier`.
    Raises InputError where a head that does not learn had no weights.
    """
    if model.head is not None and not model.head.learns and model.fresh:
        raise InputError(
            f"an adapter learns beside a trained head, but {', '.join(model.fresh)} is new; "
            "expected a model that has it, or --method full"
        )
    if model.head is None or not model.head.learns:
        return ()
    trained = model.hub_name(LAST).partition(".")[0]
    return (trained, *(name for name in model.fresh if not is_within(name, (trained,))))


def train_saved(model: nn.Module, saved: tuple[str, ...]) -> None:
    """Makes these modules of the head learn, by the hub's names."""
    for name, module in model.named_modules():
        if name.startswith("head.") and is_within(model.hub_name(name), saved):
            module.requires_grad_()


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Our name of an adapted layer -> what wraps it, the outermost where one is inside another."""
    found = {name: m for name, m in model.named_modules() if hasattr(m, "matrix") and hasattr(m, "frozen")}
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}
