"""What all adapters have in common in PEFT's files and in the options of a run."""

from torch import nn

from .targets import Names, name_in

PREFIX = "base_model.model."

# what every configuration has: the kinds of the values that are read, and options that change nothing here
NAMES = ((str, list), "a string or a list of names")
KINDS = {
    **dict.fromkeys(("target_modules", "exclude_modules"), NAMES),
    "modules_to_save": (list, "a list of names"),
    "base_model_name_or_path": (str, "a string"),
}
KNOWN = KINDS.keys() | set("auto_mapping inference_mode peft_type peft_version revision task_type".split())


def tensor_name(model: nn.Module, hub: str) -> str:
    """How an adapter's file calls what the hub calls `hub`."""
    return PREFIX + name_in(model, hub)


def check_kinds(found: dict, kinds: dict) -> None:
    """Raises ValueError where a value, if it is not null, is of another kind.

    kinds: {key: (types, what to expect)}, beside those that every configuration has.
    """
    for key, (types, expected) in (KINDS | kinds).items():
        value = found.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            raise ValueError(f"{key} is {str(value)[:80]!r}; expected {expected}")


def check_unknown(found: dict, known: set[str]) -> list[str]:
    """A sentence about options that PEFT has added since. Raises ValueError for one that is a switch, and on.

    known: the options that are, beside those that every configuration has.
    """
    unknown = {key: value for key, value in found.items() if value and key not in known | KNOWN}
    for key, value in unknown.items():
        if value is True or key.startswith("use_") or key.endswith("_config"):
            raise ValueError(f"{key} is {value!r}, an option that is not known here; expected none that is on")
    if not unknown:
        return []
    return [f"options that are not known here, and not used: {', '.join(unknown)}"]


def targets_from_peft(value: str | list | None) -> Names:
    """Targets as they are here: a regular expression as it is, a list as a tuple."""
    return value if isinstance(value, str) else tuple(sorted(map(str, value or ())))


def saved_in_file(found: dict, heads: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that were trained in full: those that are named, and `heads`, which PEFT trains by itself."""
    named = found.get("modules_to_save") or ()
    return tuple(dict.fromkeys(map(str, (*named, *heads))))


def common_fields(found: dict, heads: tuple[str, ...]) -> dict:
    """The fields that every configuration has; heads: modules that PEFT trains without being told."""
    return {
        "targets": targets_from_peft(found.get("target_modules")),
        "exclude": targets_from_peft(found.get("exclude_modules")),
        "saved": saved_in_file(found, heads),
        "base": found.get("base_model_name_or_path") or "",
    }


def targets_for_peft(model: nn.Module, targets: Names, layers: tuple[int, ...], chosen: list[str]) -> Names:
    """Targets as PEFT understands them, or the names of the chosen layers where it would not.

    It does not know "all-linear" in a file, and refuses a regular expression beside numbers of layers.
    """
    if targets == "all-linear" or (isinstance(targets, str) and layers):
        return tuple(name_in(model, hub) for hub in chosen)
    return targets


def as_option(value: object) -> object:
    """A field of a configuration as the command line takes it: what holds several values with commas between."""
    if isinstance(value, dict):
        value = tuple(f"{key}={number:g}" for key, number in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return value
