"""What a report tells: gathered from run folders, and asked of their models. The page is measure/report.py.

A run may be old, interrupted or half lost: whatever cannot be read is a sentence in the report, not an error.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from contextlib import redirect_stderr
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from .adapters import adapt, saved_as
from .adapters.learned import learned, learned_in_full
from .checkpoints import loading
from .config import ReportConfig, TrainConfig, parse_json
from .data.examples import sample
from .data.tokenizer import Tokenizer
from .errors import InputError, short_repr
from .evaluation import TOKENS, predictions
from .files import check_output_file, write_text
from .generation import Sampling, completions
from .measure.html import NO_PLOTS, can_draw
from .measure.report import Asked, Hard, Seen, page
from .measure.track import result_columns, say
from .models import Model, check_length
from .runs import read_examples
from .tables import TASKS, method_named
from .tasks import task_named

SEED = 0  # of the draw of examples that are asked about
WORDS = 48  # tokens of a completion
HARD = 12  # examples in the list of the hardest


def write_report(config: ReportConfig) -> Path:
    """Writes the page, and returns its path. Raises InputError for what is no run, or no trace."""
    out = Path(config.out)
    folders = [Path(name) for name in config.runs]
    check_output_file("--out", out, config.runs, config.overwrite)
    for folder in folders:
        check_run(folder)
    trace = read_trace(Path(config.trace)) if config.trace else None
    if not can_draw():
        say(NO_PLOTS)
    runs = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        run = read_run(folder, name)
        ask_models(run, config)
        runs.append(run)
    written = f"Written on {date.today()} by minift {version('minift')}."
    write_text(out, page(runs, trace, written))
    return out


def check_run(folder: Path) -> None:
    """Raises InputError where nothing says that this is a run."""
    files = ("config.json", "metrics.jsonl", "results.csv")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the folder of a run (--out of `minift train`)")
    if not any((folder / name).is_file() for name in files):
        raise InputError(f"{folder}: found no {' or '.join(files)}; expected the folder of a run")


def names_of(folders: list[Path]) -> list[str]:
    """What runs are called: as much of the end of each path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    longest = max(map(len, parts))
    for n in range(1, longest):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({i + 1})" for i, folder in enumerate(folders)]


# ---- files


def read_run(folder: Path, name: str) -> Seen:
    """What the files of a run say."""
    run = Seen(name, folder)
    run.config = read_object(run, "config.json", "options")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    run.changed = {key: value for key, value in run.config.items() if value != defaults.get(key)}
    task = task_of_run(run)
    if task:
        run.best = task.Metrics.best
    run.steps = read_steps(run, task)
    if run.steps and not any(math.isfinite(value) for value in run.values("eval/loss")):
        run.lacks("curves", "nothing was held out (--valid), so only the training is shown")
    run.ledger = checked_ledger(read_object(run, "ledger.json", "ledger"))
    if run.ledger and "kinds" not in run.ledger["forecast"]:
        run.lacks("ledger", "ledger.json has no forecast by kind of memory")
    run.finished = (folder / "last").is_dir()
    if not run.finished:
        run.lacks("summary", "the run is not finished; it is shown as far as it came")
    return run


def read_object(run: Seen, name: str, section: str) -> dict:
    """A JSON file of a run, or {} with a sentence about it."""
    path = run.folder / name
    if not path.is_file():
        run.lacks(section, f"there is no {name}, as in a run that was interrupted or is of an older minift")
        return {}
    try:
        found = parse_json(path.read_bytes(), path)
        if not isinstance(found, dict):
            raise InputError(f"{path}: found {type(found).__name__}; expected an object")
        return found
    except (InputError, OSError) as e:
        run.lacks(section, str(e))
        return {}


def checked_ledger(found: dict) -> dict:
    """{"forecast": ..., "measured": ...} with the numbers that are numbers."""
    if not found:
        return {}
    ledger = {}
    for which in ("forecast", "measured"):
        part = found.get(which)
        numbers = numbers_in(part)
        kinds = numbers_in(part.get("kinds")) if isinstance(part, dict) else {}
        ledger[which] = numbers | ({"kinds": kinds} if kinds else {})
    return ledger


def numbers_in(found: object) -> dict:
    """What in an object is a finite number."""
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if is_finite(value)}


def is_finite(value: object) -> bool:
    """Whether a value from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def task_of_run(run: Seen) -> ModuleType | None:
    """The file of the task that a run learned, or None where that is not known here."""
    name = run.config.get("task")
    return task_named(name) if name in TASKS else None


def json_lines(run: Seen, name: str, section: str) -> Iterator[dict]:
    """The objects in the lines of a file; how many lines cannot be read is noted."""
    faults = 0
    with open(run.folder / name, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                yield found
            else:
                faults += 1
    if faults:
        lines = "line" if faults == 1 else "lines"
        run.lacks(section, f"{faults} {lines} of {name} cannot be read, as where a run was killed while it wrote")


def read_steps(run: Seen, task: ModuleType | None) -> list[dict]:
    """The steps of a run in their order, "step" in each; of a step that stands there twice, the later one."""
    if (run.folder / "metrics.jsonl").is_file():
        rows = list(json_lines(run, "metrics.jsonl", "curves"))
    elif (run.folder / "results.csv").is_file():
        run.lacks("curves", "there is no metrics.jsonl; results.csv has less: no speed, no memory")
        rows = list(read_results(run.folder / "results.csv", task))
    else:
        run.lacks("curves", "there is neither metrics.jsonl nor results.csv")
        rows = []
    steps = {}
    for i, row in enumerate(rows):
        number = row.get("train/global_step")
        step = int(number) if is_finite(number) else i + 1
        steps[step] = row | {"step": step}
    if rows and not steps[max(steps)].get("train/tokens_per_second"):
        run.lacks("speed", "the speed of the steps is not known")
    found = [steps[step] for step in sorted(steps)]
    gaps = sum(b["step"] - a["step"] > 1 for a, b in zip(found, found[1:], strict=False))
    if gaps:
        run.lacks("curves", f"steps are missing in {gaps} places")
    return found


def read_results(path: Path, task: ModuleType | None) -> Iterator[dict]:
    """The rows of a results.csv by the names of metrics.jsonl."""
    names = result_columns(task) if task else {"train_loss": "train/loss", "valid_loss": "eval/loss"}
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            found = {"train/global_step": number_or_none(row.get("step"))}
            yield found | {name: number_or_none(row.get(column)) for column, name in names.items()}


def number_or_none(text: str | None) -> float | None:
    """The number in a cell."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_trace(path: Path) -> dict:
    """The tree in a trace, with all that the page reads of its nodes. Raises InputError."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"--trace {path}: cannot be read ({e.strerror})") from e
    root = parse_json(content, path)
    if isinstance(root, dict) and isinstance(root.get("step"), dict):
        root = root["step"]
    expected = "expected the JSON of `minift trace --out`: nodes with name, ms and children"
    if not isinstance(root, dict) or not is_finite(root.get("ms")) or root["ms"] <= 0:
        raise InputError(f"--trace {path}: found {short_repr(root)}; {expected}")
    return checked_node(root, path, expected)


def checked_node(node: Any, path: Path, expected: str) -> dict:
    """A node and all below it, with the fields that the page reads."""
    children = node.get("children", []) if isinstance(node, dict) else None
    if not isinstance(children, list) or not is_finite(node.get("ms")):
        raise InputError(f"--trace {path}: found {short_repr(node)}; {expected}")
    return {
        "name": str(node.get("name", "")),
        "kind": str(node.get("kind", "")),
        "file": str(node.get("file") or ""),
        "line": str(node.get("line") or ""),
        "ms": max(0.0, float(node["ms"])),
        "saved": node["saved"] if is_finite(node.get("saved")) else 0,
        "children": [checked_node(child, path, expected) for child in children],
    }


# ---- what the models say


def ask_models(run: Seen, config: ReportConfig) -> None:
    """What a run's model learned, and what it says of some examples, beside what its base says."""
    task = run.config.get("task")
    say(f"{run.folder}: what its model learned")
    try:
        model, tokenizer = loading.load(run.folder, task, base_model=config.base_model, fresh_head=False)
    except (InputError, OSError) as e:
        for section in ("learned", "asked"):
            run.lacks(section, f"the model cannot be loaded: {e}")
        model = tokenizer = None
    examples = read_data(run)
    rank_examples(run, examples[0])
    if model is None:
        return
    run.labels = list(model.labels or [])
    before = load_base(run, model, config)
    run.weights = weights_of(model, run.config.get("method"))
    if model.adapter:
        run.learned = list(learned(model))
    elif before:
        run.learned = list(learned_in_full(model, before))
    if not run.learned and (model.adapter or before):
        run.lacks("learned", "no linear layer has changed")
    if config.examples:
        ask(run, model, before, tokenizer, examples, config.examples)


def weights_of(model: Model, method: str | None) -> tuple[int, int]:
    """(how many weights learned, how many there are)."""
    if not model.adapter and method_named(method or "") and not saved_as(method):
        adapt(model, method)  # a model without an adapter does not say what of it was frozen
    return sum(p.numel() for p in model.parameters() if p.requires_grad), model.size()


def load_base(run: Seen, model: Model, config: ReportConfig) -> Model | None:
    """The model as it was before the run, or None with a sentence."""
    if run.config.get("init", TrainConfig.init) != TrainConfig.init:
        for section in ("learned", "asked"):
            run.lacks(section, "the run began with weights drawn at random: before it, the model knew nothing")
        return None
    source = config.base_model or (model.adapter.base if model.adapter else run.config.get("model"))
    try:
        if not source:
            raise InputError("config.json does not say which")
        return loading.load(source, model.task, model.labels or None)[0]
    except (InputError, OSError) as e:
        run.lacks("asked", f"the model that it began with cannot be loaded: {e}")
        if not model.adapter:
            run.lacks("learned", f"the model that it began with cannot be loaded: {e}")
        return None


def read_data(run: Seen) -> tuple[list, list]:
    """(training, held out) examples of a run, as it read them; empty where they are not there any more."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    try:
        config = TrainConfig(**{name: value for name, value in run.config.items() if name in known})
        config.check()
        if not config.data:
            raise InputError("config.json names no data, as of a run on lists in Python")
        return read_examples(config)
    except (ValueError, OSError) as e:
        run.lacks("asked", f"the examples cannot be read: {e}")
        return [], []


def ask(
    run: Seen, model: Model, before: Model | None, tokenizer: Tokenizer | None, examples: tuple[list, list], most: int
) -> None:
    """Asks about some examples, both models where there are two."""
    task = task_of_run(run)
    if not hasattr(task, "question"):
        return run.lacks("asked", "it is not known how an example is asked about")
    found, where = (examples[1], "held out") if examples[1] else (examples[0], "that it was trained on: none held out")
    chosen = sample(found, min(most, len(found)), SEED) if found else []
    pairs = [pair for example in chosen if (pair := task.question(example, tokenizer))]
    if not pairs or tokenizer is None:
        if found:
            run.lacks("asked", "of running text nothing is asked: it has no questions")
        return
    run.asked_of = f"{len(pairs)} examples {where}, drawn at random; the most likely answer of each model."
    loaded: Any = before and before.report
    fresh = loaded and (loaded.fresh or loaded.reshaped or loaded.relabelled)
    if fresh:
        why = "drawn at random when the run began, and before it their answers meant nothing"
        run.lacks("asked", f"there is no “before”: {shortened(fresh)} were {why}")
    questions = [question for question, _ in pairs]
    try:
        after = said(model, tokenizer, questions)
        earlier = [None] * len(after) if before is None or fresh else said(before, tokenizer, questions)
    except InputError as e:
        return run.lacks("asked", f"the examples cannot be asked about: {e}")
    for (question, right), first, second in zip(pairs, earlier, after, strict=True):
        run.asked.append(Asked(words_of(question), right, first, second))


def shortened(names: list[str]) -> str:
    """Some names, or the first of many."""
    return ", ".join(names) if len(names) < 5 else f"{names[0]} and {len(names) - 1} others"


def said(model: Model, tokenizer: Tokenizer, questions: list) -> list[str]:
    """What a model says of each, in words."""
    task = task_named(model.task)
    with redirect_stderr(io.StringIO()):  # no progress bar for a handful
        if task.predictions is None:
            return [one["completion"] for one in completions(model, tokenizer, questions, WORDS, Sampling())]
        found = list(predictions(model, tokenizer, questions, check_length(model, 0), TOKENS))
    return [in_words(one) for one in found]


def in_words(found: dict) -> str:
    """A prediction, in a few words."""
    if "label" in found and "scores" in found:
        return f"{found['label']} ({found['scores'][found['label']]:.0%})"
    if "masks" in found:
        return "; ".join(", ".join(f"{word.strip()} {p:.0%}" for word, p in mask.items()) for mask in found["masks"])
    return json.dumps(found, ensure_ascii=False)


def words_of(question) -> str:
    """An example as it is shown: its texts."""
    if hasattr(question, "parts"):
        return "".join(text for text, _ in question.parts)
    return question.text if question.pair is None else f"{question.text}\n{question.pair}"


# ---- the hardest examples


def rank_examples(run: Seen, examples: list) -> None:
    """The training examples that were hardest, and which were never learned."""
    ranked = hardest_first(run)
    run.hard = ranked[:HARD]
    run.trained_on = len(ranked)
    run.never_learned = [one.number for one in ranked if one.never_learned]
    task = task_of_run(run)
    for one in run.hard:
        if task and hasattr(task, "question") and 0 <= one.number < len(examples):
            pair = task.question(examples[one.number], None)
            if pair:
                one.question, one.right = words_of(pair[0]), pair[1]


def hardest_first(run: Seen) -> list[Hard]:
    """All training examples by their mean loss, the largest first; none, with a sentence, where no losses are known."""
    if not (run.folder / "examples.jsonl").is_file():
        run.lacks("hard", "there is no examples.jsonl, as in a run of an older minift")
        return []
    losses: dict[int, dict[int, float]] = {}
    for row in json_lines(run, "examples.jsonl", "hard"):
        epoch, number, loss = row.get("epoch"), row.get("example"), row.get("loss")
        if is_finite(epoch) and is_finite(number) and is_finite(loss):
            losses.setdefault(int(number), {})[int(epoch)] = float(loss)
    if not losses:
        run.lacks("hard", "examples.jsonl has no losses")
    trained_on = [Hard(number, [found[e] for e in sorted(found)]) for number, found in losses.items()]
    return sorted(trained_on, key=lambda one: -one.mean)
