"""The command line: `minift COMMAND`, of which COMMANDS at the end of this file has the list.

Results go to standard output, progress and messages to standard error.
Exit codes: 0 done, 1 bad input, 2 bad usage, 130 and 143 interrupted after a checkpoint.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from .config import (
    CheckConfig,
    Config,
    DemoConfig,
    DiffConfig,
    EvalConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    NewConfig,
    PlanConfig,
    PredictConfig,
    ReportConfig,
    TraceConfig,
    TrainConfig,
    add_options,
    from_args,
    meant,
)
from .errors import InputError, printable, table_lines


def train(config: TrainConfig) -> int:
    """Reads the data, then the model, then trains."""
    from .checkpoints.hub import default_model
    from .data.tokenizer import require_tokenizer
    from .engine.distributed import leave
    from .measure.track import say, speaks
    from .planning import fit_aside, footprint
    from .runs import Interrupted, check_out, prepare_run, read_labelled
    from .setup import load_model
    from .training import loop

    check_out(config)
    if not config.model:
        config = replace(config, model=default_model(config.task))
        say(f"no --model: {config.model}, which ships with minift and is small; --model takes a folder or a hub id")
    if config.fit:
        config = fit_aside(config)
    labels, *examples = read_labelled(config)
    model, tokenizer = load_model(config, labels)
    require_tokenizer(tokenizer, config.model)
    try:
        job, sequences, held_out = prepare_run(model, tokenizer, config, examples)
        before = footprint(model)
        done = loop(job, tokenizer, sequences, held_out)
    except Interrupted as e:
        say(f"{e}\nto go on: minift train --resume --out {shlex.quote(config.out)}")
        return 128 + e.number
    finally:
        leave()
    if speaks():
        next_command = job.task.next_command(shlex.quote(config.out), examples[0][0], tokenizer)
        tell_end(done, job, sequences, before, len(examples[1]), next_command)
    return 0


def tell_end(done, job, sequences: list, before: tuple[int, int], n_valid: int, next_command: str) -> None:
    """Prints how a run ended, with what it took beside what it should have taken.

    done, job: its Run and Job; sequences: that it trained on; before: its `footprint`; n_valid: examples held out.
    """
    from .measure.summary import summarize
    from .measure.track import peak_memory, say
    from .planning import forecast_run, write_ledger

    peak = peak_memory()  # before a forecast takes some
    plan = forecast_run(job, sequences, before)
    planned = None
    if plan:
        planned = {"memory": plan.memory, "seconds": plan.seconds}
        write_ledger(done.out, plan)
    print_metrics({f"valid {name}": value for name, value in done.metrics.items()}, done.details, job.task)
    lines = summarize(done, job.model, job.config.method, n_valid, peak, planned, next_command)
    say("\n".join(["", *lines]))


def plan(config: PlanConfig) -> None:
    """Prints what a run would take."""
    from .checkpoints.hub import default_model
    from .planning import as_json, describe, fitted, forecast

    if not config.model:
        config = replace(config, model=default_model(config.task))
    found = fitted(config) if config.fit else forecast(config)
    print("\n".join(describe(found)))
    if config.json:
        print(json.dumps(as_json(found)))


def trace(config: TraceConfig) -> None:
    """Prints a step as a tree, and writes it."""
    from .checkpoints.hub import default_model
    from .tracing import describe, trace_run, write_files

    if not config.model:
        config = replace(config, model=default_model(config.task))
    traced = trace_run(config)
    write_files(traced, config)
    print("\n".join(describe(traced, shutil.get_terminal_size().columns, config.unfold)))


def demo(config: DemoConfig) -> None:
    """Shows the main job from end to end."""
    from .demo.tour import run

    run(config)


def new(config: NewConfig) -> None:
    """Makes a model folder, and says how to train it."""
    from .checkpoints.new import make_folder

    print(make_folder(config))
    print(f"to train it: minift train --model {config.out} --init random --data ... --out ...", file=sys.stderr)


def evaluate(config: EvalConfig) -> None:
    """Prints the metrics."""
    from .evaluation import evaluate as run
    from .tasks import task_of

    model, tokenizer = trained(config, config.task)
    metrics = run(model, tokenizer, config)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    details = {name: value for name, value in metrics.items() if name not in numbers}
    print_metrics(numbers, details, task_of(model))
    if config.json:
        print(json.dumps(metrics))


def predict(config: PredictConfig) -> None:
    """Writes one JSON object a line."""
    from .evaluation import predict as run

    write_results(run, config, config.task)


def generate(config: GenerateConfig) -> None:
    """Writes one JSON object a line."""
    from .generation import generate as run

    write_results(run, config, "complete")


def write_results(run: Callable, config: PredictConfig | GenerateConfig, task: str) -> None:
    """What `run` says of each input, as JSON lines to `--out` or to standard output.

    Raises InputError, before the model is read, where `--out` must not be written.
    """
    from .files import check_output_file, write_lines

    if config.out:
        check_output_file("--out", Path(config.out), [config.data], config.overwrite)
    rows = run(*trained(config, task), config)
    if config.out:
        write_lines(Path(config.out), (json.dumps(row, ensure_ascii=False) for row in rows))
        return
    # a terminal that is not UTF-8 gets JSON's own escapes
    ascii_only = "utf" not in (sys.stdout.encoding or "utf-8").lower()
    for row in rows:
        print(json.dumps(row, ensure_ascii=ascii_only), flush=True)


def check(config: CheckConfig) -> int:
    """Prints every fault as it is met, then the report."""
    from .checkpoints import hub
    from .data.check import check_file
    from .tasks import task_named

    checks = task_named(config.task).CHECKS
    if checks is None:
        raise InputError(f"--task is {config.task}, whose files have no check of their own; training finds the faults")
    tokenizer = hub.read_tokenizer_of(config.model) if config.model else None
    report = check_file(config, checks, tokenizer)
    print(report)
    return 0 if report.ok else 1


def merge(config: MergeConfig) -> None:
    """Merges, and prints what it cost."""
    from .checkpoints.merging import write as run

    cost = run(config)
    print_columns(("layer", "relative error"), [(name, f"{error:.2e}") for name, error in cost.layers.items()], "<>")
    print(
        f"logits: relative error {cost.logits:.2e}, divergence {cost.divergence:.2e} nats; the model is in {config.out}"
    )


def inspect(config: InspectConfig) -> None:
    """Prints every tensor, then the sums; of an adapter, what it learned."""
    from .checkpoints import loading

    model, _ = loading.load(config.model, task_of(config.model), base_model=config.base_model)
    tensors = {name: t for name, t in model.named_parameters()} | dict(model.named_buffers())
    rows = [row_of(name, tensor) for name, tensor in tensors.items()]
    print_columns(("tensor", "shape", "dtype", "bytes", "trainable"), rows, "<<<><")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{model.size():,} parameters, {trainable:,} trainable, {sum(t.nbytes for t in tensors.values()):,} bytes")
    head = model.task or "no head"
    if model.labels:
        head += f": {printable(', '.join(model.labels))}"
    print(f"{model.settings['model_type']}, {head}")
    print("\n".join(map(printable, str(model.report).split("\n"))))
    print_learned(model, Path(config.model, "config.json"))


def print_learned(model, run: Path) -> None:
    """The size and rank of each update, where there is an adapter or `run` is the config.json of a run folder."""
    from .adapters.learned import learned, learned_in_full
    from .checkpoints import loading

    before, updates = model.adapter and model.adapter.base, learned(model)
    if not before and run.is_file():
        before = json.loads(run.read_text()).get("model")
        try:
            updates = before and learned_in_full(model, loading.load(before, model.task, model.labels)[0])
        except InputError as e:
            print(f"\nwhat it learned cannot be told: {e}")
            return
    if before:
        print(f"\nlearned on top of {before}:")
        rows = []
        for u in updates:
            largest = " ".join(f"{s:.2g}" for s in u.singular[:8])
            rows.append((u.layer, f"{u.rank}", f"{u.effective_rank:.2f}", f"{u.norm:.2e}", largest))
        print_columns(("layer", "rank", "effective", "|update|/|W|", "singular values"), rows, "<>>><")


def print_columns(head: tuple[str, ...], rows: list[tuple[str, ...]], sides: str) -> None:
    """An aligned table; sides: < or > for each column."""
    print("\n".join(table_lines(head, rows, sides)))


def diff(config: DiffConfig) -> None:
    """Prints how two runs differ."""
    from .diffing import compare

    for line in compare(config):
        print(line)


def report(config: ReportConfig) -> None:
    """Writes the page, and says where it is."""
    from .reporting import write_report

    print(write_report(config))


def row_of(name: str, p) -> tuple[str, ...]:
    """The cells of a parameter's row."""
    return name, "x".join(map(str, p.shape)), str(p.dtype)[6:], f"{p.nbytes:,}", "yes" if p.requires_grad else "no"


def task_of(source: str) -> str | None:
    """The task that a model folder's head is for, by its config.json; None also where an adapter says it."""
    from .checkpoints import hub
    from .models import family_named
    from .tasks import task_of_architecture

    folder = hub.resolve(source)
    if not (folder / "config.json").is_file():
        return None
    settings = hub.read_settings(folder)
    return task_of_architecture(family_named(settings["model_type"]), settings)


def trained(config: EvalConfig | PredictConfig | GenerateConfig, task: str) -> tuple:
    """(model, tokenizer) with a head that was trained."""
    from .checkpoints import loading
    from .data.tokenizer import require_tokenizer
    from .engine.precision import choose_device

    device = choose_device(config.device)[0]
    model, tokenizer = loading.load(config.model, task, base_model=config.base_model, fresh_head=False, device=device)
    for note in model.report.notes:
        print(note, file=sys.stderr)
    return model, require_tokenizer(tokenizer, config.model)


def print_metrics(numbers: dict, details: dict, task: ModuleType) -> None:
    """One name and number a line, the numbers aligned; then what else the task has to tell."""
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value:,}")
    if details:
        print("\n".join(["", *task.describe(details, shutil.get_terminal_size().columns)]), flush=True)


COMMANDS: dict[str, tuple[type[Config], Callable]] = {
    "train": (TrainConfig, train),
    "plan": (PlanConfig, plan),
    "trace": (TraceConfig, trace),
    "eval": (EvalConfig, evaluate),
    "predict": (PredictConfig, predict),
    "generate": (GenerateConfig, generate),
    "merge": (MergeConfig, merge),
    "check": (CheckConfig, check),
    "inspect": (InspectConfig, inspect),
    "diff": (DiffConfig, diff),
    "report": (ReportConfig, report),
    "new": (NewConfig, new),
    "demo": (DemoConfig, demo),
}


OTHER_COMMANDS = {
    "finetune": "train",
    "fine-tune": "train",
    "fit": "train",
    "evaluate": "eval",
    "test": "eval",
    "infer": "predict",
    "inference": "predict",
    "classify": "predict",
    "complete": "generate",
}  # what other tools call a command, and what it is called here

FIRST = "minift demo\nminift train --data reviews.csv --valid 0.1 --out runs/first"


class Help(argparse.HelpFormatter):
    """Help in the terminal's width, up to a hundred columns; commands to be copied are not broken."""

    def __init__(self, prog: str):
        super().__init__(prog, width=min(shutil.get_terminal_size().columns, 100) - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """The help of an option; no name with a hyphen in it is broken."""
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The description, a paragraph at a time. Both names are argparse's: it knows no other way."""
        paragraphs = []
        for paragraph in cleandoc(text).split("\n\n"):
            if paragraph.startswith("minift ") or paragraph.startswith("  "):
                shown = [f"  {line.removeprefix('  ')}" for line in paragraph.split("\n")]
            else:
                shown = self._split_lines(paragraph.replace("\n", " "), width)
            paragraphs.append("\n".join(shown))
        return "\n\n".join(paragraphs)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with what was probably meant."""

    def __init__(self, **options):
        # no abbreviations: what --tok means must not change when an option is added
        super().__init__(usage=argparse.SUPPRESS, formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        print(f"{self.prog}: error: {message}\n(`{self.prog} --help` says what there is)", file=sys.stderr)
        raise SystemExit(2)


def overview() -> str:
    """What `minift --help` says: each command with the first line of its own help."""
    lines = []
    for name, (cls, _) in COMMANDS.items():
        first, _, _ = str(cls.__doc__).partition("\n")
        lines.append(f"  {name:<8}  {first}")
    paragraphs = [
        "A minimal fine-tuning engine in plain PyTorch. To begin with:",
        FIRST,
        "\n".join(lines),
        "`minift COMMAND --help` has examples and every option.",
    ]
    return "\n\n".join(paragraphs)


def parse(arguments: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """(the parser of the command, its options). Leaves the process by SystemExit(2) where they are not understood."""
    parser = Parser(prog="minift", description=overview())
    commands = parser.add_subparsers(
        prog="minift", dest="command", required=True, metavar="COMMAND", parser_class=Parser, help=argparse.SUPPRESS
    )
    for name, (cls, _) in COMMANDS.items():
        command = commands.add_parser(name, description=cls.__doc__, add_help=False)
        add_options(command, cls)
    arguments = sys.argv[1:] if arguments is None else arguments
    expected = f"expected one of {', '.join(COMMANDS)}"
    if not arguments:
        parser.error(f"no COMMAND was given; {expected}")
    name = arguments[0]
    if not name.startswith("-") and name not in COMMANDS:
        parser.error(f"{name!r} is no COMMAND; {expected}{meant(OTHER_COMMANDS.get(name, name), COMMANDS)}")
    args, unknown = parser.parse_known_args(arguments)
    command = commands.choices[args.command]
    if unknown:
        known = [flag for action in command._actions for flag in action.option_strings]
        command.error(f"{unknown[0]} is no option{meant(unknown[0].partition('=')[0], known)}")
    return command, args


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    prepare_streams()
    command, args = parse(arguments)
    cls, run = COMMANDS[args.command]
    try:
        config = from_args(cls, args)
    except InputError as e:
        return complain(e)
    except ValueError as e:
        command.error(str(e))
    try:
        return run(config) or 0
    except BrokenPipeError:  # whoever read the results has enough of them, as `| head` does
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the interpreter flushes it once more at its end
        return 141
    except (InputError, FloatingPointError, OSError) as e:
        return complain(e)
    except KeyboardInterrupt as e:  # before the loop, or twice within it
        print("\n".join(["minift: interrupted", *notes(e)]), file=sys.stderr)
        return 130
    except Exception as e:
        if is_out_of_memory(e):
            return complain(InputError(f"out of memory ({first_line(e)}); fewer --tokens at once take less"))
        return report_fault(e)


def prepare_streams() -> None:
    """Makes standard output and error take everything, also where they are closed or know few signs."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start, as by `2>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # what the encoding has no sign for is shown as its escape
            stream.reconfigure(errors="backslashreplace")


def complain(error: Exception) -> int:
    """Says what is wrong with the input; the exit code for that."""
    lines = [printable(line) for line in f"minift: error: {error}".split("\n")]
    print("\n".join([*lines, *notes(error)]), file=sys.stderr)
    return 1


def notes(error: BaseException) -> list[str]:
    """What was added to an error on its way."""
    return [printable(note) for note in getattr(error, "__notes__", ())]


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or torch found no memory; torch has a class for it on CUDA only."""
    words = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0][:200]) if lines else type(error).__name__


def report_fault(error: Exception) -> int:
    """Says that minift itself is at fault, and where the details are; exit code 1."""
    import tempfile
    import traceback
    from importlib.metadata import version

    details = f"minift {version('minift')}, {sys.version}, {sys.platform}\n{' '.join(sys.argv)}\n\n"
    details += "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="minift-fault-", suffix=".txt", delete=False) as file:
            file.write(details.encode(errors="backslashreplace"))
            place = f"the details are in {file.name}"
    except OSError:  # nowhere to write
        place = f"{details}these are the details"
    print(
        f"minift: this is a fault of minift, not of your input: {type(error).__name__}: {first_line(error)}\n"
        f"{place}; please report them, with the input if you can share it",
        file=sys.stderr,
    )
    return 1
