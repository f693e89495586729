"""A run: its examples, its folder, its checkpoints and its best model."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import files
from .adapters import changes_base, method_file, saved_as
from .checkpoints import resume, saving, weights
from .config import TrainConfig, is_number, numbers_of
from .data import corpus
from .data.batch import Sequence, order
from .data.examples import sample, split
from .data.tokenizer import Tokenizer
from .engine.distributed import World, local
from .engine.precision import name_of
from .errors import InputError
from .evaluation import measure
from .layers.packed import packed_as
from .measure.track import Progress, check_loggers, say
from .models import Model, check_length
from .setup import Job, choose_engine, default_tokens, make_job, optimizer_settings
from .tasks import details_of, task_named, task_of


class Interrupted(Exception):
    """The run was asked to stop, and did after a checkpoint; `number` is the signal's."""

    def __init__(self, number: int, folder: Path):
        super().__init__(f"stopped by {signal.Signals(number).name}; the checkpoint is {folder}")
        self.number = number


# before the first step


def read_examples(config: TrainConfig) -> tuple[list, list]:
    """(training, validation) examples of a configuration; the second is empty without --valid. Raises InputError."""
    return set_aside(config, read_training(config, config.data))


def read_labelled(config: TrainConfig) -> tuple[list[str] | None, list, list]:
    """(labels, training, validation) of a configuration; labels: of all examples, before some are set aside."""
    whole = read_training(config, config.data)
    labels = task_named(config.task).label_names(whole, config.labels)
    return labels, *set_aside(config, whole)


def read_training(config: TrainConfig, path: str) -> list:
    """All examples of a file, as the configuration says that it is read."""
    task = task_named(config.task)
    return corpus.read_all(task.stream(path, config.columns, header=config.header, max_line=config.max_line))


def set_aside(config: TrainConfig, examples: list) -> tuple[list, list]:
    """(training, validation) examples, of which the second come from the first where --valid is a fraction."""
    valid = []
    if is_number(config.valid):
        examples, valid = split(examples, float(config.valid), config.seed)
    elif config.valid:
        valid = read_training(config, config.valid)
    return sample(examples, config.limit, config.seed) if config.limit else examples, valid


def from_lists(model: Model, config: TrainConfig, examples: list, valid: list | None) -> tuple[list, list]:
    """(training, validation) examples from lists in Python. Raises InputError."""
    task = task_of(model)
    if valid is None:
        return set_aside(config, task.from_rows(examples))
    if config.valid:
        raise InputError(f"found a list to validate on, and --valid {config.valid!r}; expected one of the two")
    return task.from_rows(examples), task.from_rows(valid)


def prepare_run(
    model: Model, tokenizer: Tokenizer, config: TrainConfig, examples: tuple[list, list] | None
) -> tuple[Job, list[Sequence], list[Sequence]]:
    """(what every step works with, the encoded training examples, the encoded validation examples).

    Everything is checked before the run folder is begun. Raises InputError.
    """
    task = task_of(model)
    config = dataclasses.replace(config, task=model.task)
    config.check()
    check_out(config)
    check_loggers(config.log)
    optimizer_settings(config)
    engine = choose_engine(config)
    config = dataclasses.replace(config, precision=name_of(engine.dtype))  # what goes on elsewhere goes on the same
    max_length = check_length(model, config.max_length)
    examples, valid = examples or read_examples(config)
    tokenise_texts(tokenizer, engine.world, examples, valid)
    sequences = task.encode(examples, model, tokenizer, max_length)
    left_out(config, len(sequences))
    held_out = task.encode(valid, model, tokenizer, max_length) if valid else []
    if valid and not any(len(sequence.targets) for sequence in held_out):
        raise InputError("--valid: none of the tokens is asked about; expected more text to validate on")
    if engine.world.first:
        tokens = config.tokens or default_tokens(model, engine.device, engine.dtype)
        announce(model, config, sequences, held_out, tokens)
        begin_folder(config, model)
    engine.world.wait()
    if model.adapter and changes_base(model.adapter.variant):
        model.max_length = max_length
        saving.save_base(model, tokenizer, Path(config.out, "base"), engine.world.first)
    return make_job(model, config, engine), sequences, held_out


def tokenise_texts(tokenizer: Tokenizer, world: World, *parts: list) -> None:
    """Sees to the file of tokens of each running text that some lists of examples are from. Raises InputError, OSError.

    What is done stays where this is interrupted, and the next run goes on from there.
    """
    for text in corpus.texts_of(*parts):
        work = corpus.tokenise(text, tokenizer)

        # the first process begins; the others then find the file locked, and wait there without a limit of time
        if not world.first:
            world.wait()
        done = next(work, None)
        if world.first:
            world.wait()

        start = time.monotonic()
        if done is not None:
            watch(text, work, done)
        tokens = corpus.find(text, tokenizer)
        if done is None:
            how = "from before"
        else:
            how = f"made in {time.monotonic() - start:.0f} s"
        say(f"{text.name}: {len(tokens):,} tokens in {tokens.folder}, {how}")
        cache = files.cache_folder("text")
        if tokens.folder.parent != cache:
            say(f"they are not in {cache}, which could not be written; XDG_CACHE_HOME may name another cache folder")


def watch(text: corpus.Text, work: Iterator[int], done: int) -> None:
    """Shows how the tokenising of a text goes on, `done` pieces of which are from an earlier run."""
    if done:
        say(f"{text.name}: going on after piece {done:,} of {text.count:,}, where an earlier run stopped")
    progress = Progress(text.count, "piece", done)
    try:
        for now in work:
            progress.add(now - progress.done)
    except (KeyboardInterrupt, OSError) as e:
        e.add_note(f"{text.name}: {progress.done:,} of {text.count:,} pieces are tokenised; the next run goes on there")
        raise
    finally:
        progress.close()


def announce(model: Model, config: TrainConfig, sequences: list[Sequence], valid: list[Sequence], at_once: int) -> None:
    """Says what is about to happen."""
    max_length = check_length(model, config.max_length)
    is_drawn = hasattr(task_of(model), "at_step")  # what is asked of an example: the next step may ask another thing
    tokens = empty = cut = 0
    for sequence in sequences:  # once: those of a running text are made as they are asked for
        tokens += len(sequence)
        empty += not is_drawn and not len(sequence.targets)
        cut += sequence.cut
    mean = tokens / len(sequences)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first, *others = task_of(model).summary(model, sequences) or [""]
    say(f"{trainable:,} of {model.size():,} parameters are trained" + (f"; {first}" if first else ""))
    for line in others:
        say(line)
    if empty:
        say(f"nothing is left to learn of {empty:,} examples, cut to {max_length} tokens")
    limit = f", at most {at_once:,} at once" if at_once else ""
    say(
        f"{len(sequences):,} examples to train on, {len(valid):,} to validate on; {mean:.1f} tokens each on average, "
        f"{config.batch * mean:,.0f} a step{limit}; {cut:,} cut to {max_length} tokens"
    )


def left_out(config: TrainConfig, n: int) -> set[int]:
    """The numbers of --without. Raises InputError where there is no such example, or where a step has no other.

    n: training examples, counted from 0.
    """
    numbers = numbers_of(config.without)
    if numbers and max(numbers) >= n:
        raise InputError(f"--without {max(numbers)}: there are {n:,} examples to train on, counted from 0")
    last = n % config.batch or config.batch  # examples of an epoch's last step, which has the fewest
    if len(numbers) < min(last, n):
        return numbers
    per_epoch = math.ceil(n / config.batch)
    total = config.steps or per_epoch * config.epochs
    for epoch in range(math.ceil(total / per_epoch)):
        steps = order(n, config.seed, epoch).split(config.batch)
        for step, chosen in enumerate(steps[: total - epoch * per_epoch]):
            if numbers.issuperset(chosen.tolist()):
                where = f"step {step + 1} of epoch {epoch + 1}"
                raise InputError(f"--without leaves nothing of {where}; expected fewer, or a larger --batch")
    return numbers


def count_seen(config: TrainConfig, n: int, steps: int) -> int:
    """The lines of examples.jsonl after so many steps on n examples."""
    left = torch.tensor(sorted(numbers_of(config.without)), dtype=torch.int64)
    per_epoch = math.ceil(n / config.batch)
    epochs, more = divmod(steps, per_epoch)
    last = order(n, config.seed, epochs)[: more * config.batch]
    return epochs * (n - len(left)) + len(last) - int(torch.isin(last, left).sum())


# the folder


def begin_folder(config: TrainConfig, model: Model) -> None:
    """Makes the run folder and its config.json; in one that is gone on with, clears what a killed process left."""
    out = Path(config.out)
    files.real(out).mkdir(parents=True, exist_ok=True)
    for folder in (out, out / "checkpoints", out / "best", out / "last", out / "base"):
        files.remove_leftovers(folder)
    if not config.resume or not (out / "config.json").exists():
        files.write_text(out / "config.json", recorded(config, model).to_json())


def check_out(config: TrainConfig) -> None:
    """Raises InputError unless the run folder is free, or is to be gone on with."""
    out = Path(config.out)
    if not config.resume and (out / "config.json").exists():
        raise InputError(f"--out {out}: is there already; expected a new or empty folder, or --resume")
    if not config.resume:
        files.check_new_folder("--out", out)
    for option, text in (("--data", config.data), ("--valid", config.valid)):
        if text and os.path.isdir(text) and files.real(text) in (files.real(out), *files.real(out).parents):
            raise InputError(f"--out {out}: lies in the folder of {option} {text}, whose sub-folders are its classes")
    if (out / "checkpoints").exists() and not (out / "checkpoints").is_dir():
        raise InputError(f"{out / 'checkpoints'}: is a file; expected the folder of the run's checkpoints")


def recorded(config: TrainConfig, model: Model) -> TrainConfig:
    """The configuration that the command line would have to be given to repeat this run, one made in Python too."""
    config = dataclasses.replace(config, resume=False, model=config.model or model.source)
    if not model.adapter or config.method != TrainConfig.method:
        return config
    options = method_file(saved_as(model.adapter.variant)).options(model)
    if base := packed_as(model):
        options["base"] = base
    return dataclasses.replace(config, **options)


# checkpoints


def last_checkpoint(config: TrainConfig) -> Path | None:
    """The folder of the run's newest checkpoint."""
    return resume.latest(Path(config.out))


def begin_state(job: Job, sequences: list[Sequence], valid: list[Sequence], total: int) -> dict:
    """What the rest of a run depends on, apart from model and optimizer: at its beginning or, with --resume, after the
    latest checkpoint, which is put into model and optimizer. total: steps of the run.
    """
    state = {
        "step": 0,
        "best": {},  # metrics of the best validation
        "details": {},  # what else its task has to tell of it
        "stale": 0,  # validations since then
        "data": resume.fingerprint(sequences),
        "valid": resume.fingerprint(valid),
        "base": job.base,
        "options": dataclasses.asdict(recorded(job.config, job.model)),
    }
    return resume_run(job, state, total) if job.config.resume else state


# options that may be another when a run goes on: they change where and how fast it runs, and not what it learns
FREE = {"model", "data", "valid", "out", "columns", "labels", "header", "max_line", "tokens", "device", "kernels"}
FREE |= {"graph", "recompute", "save_every", "keep", "shard", "log", "resume"}


def resume_run(job: Job, fresh: dict, total: int) -> dict:
    """The state of the latest checkpoint, with model and optimizer as they were; `fresh` where there is none yet."""
    folder = resume.latest(Path(job.config.out))
    if folder is None:
        say(f"{job.config.out}: no checkpoint yet; the run begins at its first step")
        return fresh

    def check(state: dict) -> None:
        check_options(folder, fresh["options"], state.get("options", {}))
        if state["step"] > total:
            raise InputError(f"{folder}: is of step {state['step']}; expected one of the run's {total} steps")
        if state["data"] != fresh["data"]:
            raise InputError(f"{folder}: the training data or the tokenizer is not what the run began with")
        if state.get("valid", fresh["valid"]) != fresh["valid"]:
            raise InputError(f"{folder}: the validation data is not what the run began with")
        if "base" in state:  # not in a checkpoint of an older minift
            resume.check_base(folder, fresh["base"], state["base"])

    state = resume.restore_checkpoint(folder, job.model, job.optimizer, check)
    scaler = state.pop("scaler")
    if job.scaler.is_enabled():
        if missing := job.scaler.state_dict().keys() - scaler.keys():
            raise InputError(f"{folder / resume.STATE}: scaler lacks {', '.join(sorted(missing))}")
        job.scaler.load_state_dict(scaler)
    say(f"resumed after step {state['step']}")
    return fresh | state | {"options": fresh["options"]}


def check_options(folder: Path, now: dict, then: dict) -> None:
    """Raises InputError where an option that changes what is learned is not what the checkpoint was made with."""
    for name in sorted(now.keys() & then.keys()):
        if now[name] == then[name]:
            continue
        if name == "precision" and then[name] == "auto":  # an older minift did not write down what that was
            continue
        flag = "--" + name.replace("_", "-")
        if name not in FREE:
            raise InputError(
                f"{flag} is {now[name]!r} in the run's config.json, but {folder} was made with {then[name]!r}; "
                "a run goes on as it began"
            )
        if name not in ("resume", "out"):
            say(f"{flag} is {now[name]!r} from here on; until now it was {then[name]!r}")


def save_checkpoint(job: Job, state: dict) -> None:
    """Writes the checkpoint of this step. Raises FloatingPointError rather than saving what is not finite."""
    check_finite(job, state["step"])
    saved = state | {"scaler": job.scaler.state_dict()}
    resume.write_checkpoint(Path(job.config.out), job.model, job.optimizer, saved, job.config.keep, job.world.first)


def check_finite(job: Job, step: int) -> None:
    """Raises FloatingPointError where a trained weight or its moments are not finite: no such model is saved."""
    faults = []
    for name, p in resume.trained(job.model):
        for tensor in (p, *job.optimizer.state.get(p, {}).values()):
            if not weights.is_finite(local(tensor.detach())):
                faults.append(name)
    count = torch.tensor([len(faults)], dtype=torch.float64, device=job.model.device)
    if job.world.add_up(count).item():
        where = faults[0] if faults else "a weight of another process"
        raise FloatingPointError(
            f"after step {step} {where} is not finite, and nothing of it was saved; "
            f"the last checkpoint: {last_checkpoint(job.config) or 'none yet'}"
        )


# the best model


def validate(job: Job, tokenizer: Tokenizer, valid: list[Sequence], state: dict) -> dict[str, float]:
    """The metrics of the validation examples; keeps the model in best/ if they are the best so far."""
    model, world = job.model, job.world
    name, better = job.task.Metrics.best
    if world.sharded:  # every forward pass is a conversation of all: all measure all
        metrics = measure(model, valid)
        world.settle(model)
    else:
        metrics = measure(model, valid[world.rank :: world.size], add_up=world.add_up)
    found = metrics.result()
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the validation loss after step {state['step']} is {found['loss']}; "
            f"the last checkpoint: {last_checkpoint(job.config) or 'none yet'}"
        )
    best = state["best"]
    state["stale"] += 1
    if not best or is_better(found, best, name, better):
        check_finite(job, state["step"])
        # an infinite perplexity, of a finite loss, has no place in a checkpoint's JSON
        state["best"] = {key: value for key, value in found.items() if math.isfinite(value)}
        state["details"] = details_of(metrics)
        state["stale"] = 0
        saving.write_model(model, tokenizer, Path(job.config.out, "best"), world.first)
    say(f"step {state['step']} valid: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items() if type(v) is float))
    return found


def is_better(found: dict, best: dict, name: str, better: Callable) -> bool:
    """Whether a validation is better by the metric `name`, or as good with a lower loss."""
    if found[name] != best[name]:
        return better(found[name], best[name]) == found[name]
    return found["loss"] < best["loss"]
