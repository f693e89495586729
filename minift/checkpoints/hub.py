"""Where the files of a model are: a folder, a run folder, or the hub's cache; and its config.json."""

import difflib
import shlex
import ssl
import threading
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from .. import tables
from ..config import meant, meant_path, parse_json
from ..data.tokenizer import FILES as TOKENIZER_FILES
from ..data.tokenizer import Tokenizer, read_tokenizer
from ..errors import InputError, short_repr
from ..models import family_named
from ..tables import BASES, FAMILIES
from ..tasks import task_named
from . import peft as peft_format
from .weights import WEIGHT_FILES, read_index

INNER = ("best", "last", "0_Transformer")  # where a model is inside a folder: of a run; of sentence-transformers
BUILTIN = Path(__file__).parents[1] / "demo" / "models"
PREFIX = "builtin:"
REACH = 1.8  # seconds in which the hub has to answer


def resolve(source: str | Path, named_by: str = "") -> Path:
    """The folder with a model's files: `source` itself, the best or last model of a run folder, a built-in model's, or
    the hub's cache.

    named_by: who says that the model is there, for the message where it is not.
    """
    folder = Path(source)
    if folder.is_dir():
        found = next((folder / name for name in INNER if has_model(folder / name)), folder)
        if found == folder and (folder / "metrics.jsonl").is_file() and (folder / "checkpoints").exists():
            go_on = f"minift train --resume --out {shlex.quote(str(source))}"
            raise InputError(f"{source}: a run that is not finished, without a model yet; to go on: {go_on}")
        return found
    who = f"{named_by} names " if named_by else ""
    if str(source).startswith(PREFIX):
        return builtin(str(source).removeprefix(PREFIX), who)
    if is_path(source) or folder.exists():
        advice = "; if it moved, say where it is: --base-model FOLDER" if named_by else meant_folder(source)
        raise InputError(f"{who}{source}: no such folder{advice}")
    return download(str(source), who)


def meant_folder(source: str | Path) -> str:
    """ " (did you mean the folder X?)" where a folder with a model has nearly this name, or ""."""

    def has_one(folder: Path) -> bool:
        return has_model(folder) or any(has_model(folder / name) for name in INNER)

    near = meant_path(source, has_one)
    if not near:
        return ""
    return f" (did you mean the folder {near if is_path(near) else f'./{near}'}?)"


def builtin(name: str, who: str = "") -> Path:
    """The folder of a model that ships with minift. Raises InputError."""
    if name not in tables.BUILTIN:
        raise InputError(f"{who}{PREFIX}{name}: no such model; expected {builtin_names()}{meant(name, tables.BUILTIN)}")
    return BUILTIN / name


def builtin_names() -> str:
    """The addresses of the models that ship with minift, in words."""
    return " or ".join(PREFIX + name for name in tables.BUILTIN)


def default_model(task: str) -> str:
    """The address of the built-in model that can learn a task. Raises InputError where none can."""
    for name in tables.BUILTIN:
        family = family_named(read_settings(BUILTIN / name)["model_type"])
        if task_named(task).architecture(family):
            return PREFIX + name
    raise InputError(f"--model is missing; no built-in model has a head for {task}")


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


def has_model(folder: Path) -> bool:
    """Whether a folder says what model or adapter is in it."""
    return any((folder / name).is_file() for name in ("config.json", peft_format.CONFIG))


def has_weights(folder: Path) -> bool:
    """Whether a whole model is in a folder."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def adapter_file(folder: Path) -> Path | None:
    """The file with an adapter's tensors, or None."""
    return next((folder / name for name in peft_format.WEIGHT_FILES if (folder / name).is_file()), None)


def download(repo: str, who: str = "") -> Path:
    """The hub's files of `repo` (an id such as bert-base-uncased or user/model), in huggingface-hub's cache."""
    offline = constants.HF_HUB_OFFLINE or not is_in_reach()
    near = meant_folder(repo)

    def fetch(name: str) -> Path | None:
        try:
            if not offline:
                return Path(hf_hub_download(repo, name))
            cached = try_to_load_from_cache(repo, name)
            return Path(cached) if isinstance(cached, str) else None
        except EntryNotFoundError:  # also where the hub went out of reach just now
            return None
        except (HfHubHTTPError, HFValidationError) as e:
            said = str(e).strip().splitlines()[-1]
            raise InputError(f"{who}{repo}: no such folder{near}, and the hub says: {said}") from e

    config = fetch(peft_format.CONFIG)
    if config is not None:
        _ = fetch(peft_format.WEIGHT_FILES[0]) or fetch(peft_format.WEIGHT_FILES[1])
        fetch(peft_format.SETTINGS)
    config = fetch("config.json") or config
    if config is None and offline:
        why = f"the hub ({constants.ENDPOINT}) is out of reach"
        if constants.HF_HUB_OFFLINE:
            why = "the hub is not asked (HF_HUB_OFFLINE is set)"
        raise InputError(
            f"{who}{repo}: no such folder{near}, and {why}; expected a folder with a model's files, a model in the "
            f"hub's cache ({constants.HF_HUB_CACHE}, which has {in_cache(repo)}), or {builtin_names()}"
        )
    if config is None:
        raise InputError(f"{who}{repo}: no such folder{near}, and no config.json of it on the hub")
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        fetch(name)
    weights = next((path for path in map(fetch, WEIGHT_FILES) if path), None)
    if weights and weights.suffix == ".json":
        for shard in set(read_index(weights).values()):
            fetch(shard)
    return config.parent


def in_cache(repo: str) -> str:
    """The models in the hub's cache, in words; `repo` is not whole among them."""
    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    names = [folder.name.removeprefix("models--").replace("--", "/") for folder in folders]
    names = [name for name in names if name != repo]
    if not names:
        return "none"
    near = difflib.get_close_matches(repo, names, 5, cutoff=0.5)  # the nearest first
    shown = [*near, *(name for name in names if name not in near)]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} others" if len(shown) > 5 else "")


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


def read_settings(folder: Path, name: str = "config.json") -> dict:
    """The model's config.json. Raises InputError that names the field, where one is of a kind that nobody can use."""
    path = folder / name
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; {', '.join(inside[:5])} in it {'has' if len(inside) == 1 else 'have'} one" if inside else ""
        raise InputError(f"{folder}: no config.json; expected a model folder as transformers writes it{hint}")
    settings = parse_json(path.read_bytes(), path)
    found = settings.get("model_type") if isinstance(settings, dict) else type(settings).__name__
    if not isinstance(settings, dict) or not isinstance(found, str) or found not in FAMILIES:
        raise InputError(f"{path}: model_type is {short_repr(found)}; expected one of {', '.join(FAMILIES)}")
    for name, kind in (("minift", dict), ("quantization_config", dict), ("architectures", list)):
        if not isinstance(settings.get(name) or kind(), kind):
            expected = {dict: "an object", list: "a list"}[kind]
            raise InputError(f"{path}: {name} is {short_repr(settings[name])}; expected {expected}")
    own = settings["minift"] = settings.get("minift") or {}
    length = own.get("max_length", 0)
    if own.get("base", "") not in ("", *BASES) or type(length) is not int or length < 0:
        expected = f"base {' or '.join(BASES)} or none, and max_length a number"
        raise InputError(f"{path}: minift is {short_repr(own)}; expected {expected}")
    if not own:
        del settings["minift"]
    return settings


def read_tokenizer_of(source: str | Path) -> Tokenizer:
    """The tokenizer in a folder or of a hub id, whose model need not be there. Raises InputError."""
    folder = resolve(source)
    path = folder / "config.json"
    settings = parse_json(path.read_bytes(), path) if path.is_file() else {}
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    rules = None
    if isinstance(model_type, str) and model_type in FAMILIES:
        rules = family_named(model_type).TOKENIZER
    return read_tokenizer(folder, rules)
