"""What is learned, one file each. Nothing outside this folder asks which task it is.

A task is a file here and a line in tables.TASKS. N tokens, M rows asked about, T targets, C width. It may take what it
shares with another task from that one's file (`from . import classify`). The file defines

    stream(path, columns, need_label, header, max_line) -> a Stream of its examples, read anew each time they are asked
        for; need_label False: what is right may be absent. It raises InputError: file, line, what was found, what was
        expected. data/examples.py has what it is made of: labelled_rows -> (where, {"text", "pair", "label"}) of any
        kind of file; make_example, for which a label is a string or a whole number; Stream. Of a stream of running
        text, a training takes the pieces that data/corpus.py makes of it
    from_rows(rows, labelled) -> the same from a list in Python; labelled: whether what is right has to be there
    CHECKS            what `minift check` looks at (data/check.py); None: nothing
    label_names(examples, given) -> the classes of a training set, `given` being --labels; None: the task has none
    judge(examples, model, tokenizer, labelled) -> what `encoded` needs of each example beside it (its label's number,
        or any value), in one pass that keeps no example; raises InputError for examples that this model cannot be asked
    encoded(examples, labels, model, tokenizer, max_length) -> an iterator of data.batch.Sequence: tokens, the rows
        asked about, and targets, an array of any dtype with T entries along its first axis. Only with one class a row,
        as integers, --graph works: it adds rows of class -1, which the loss has to leave out
    encode(examples, model, tokenizer, max_length, labelled) -> the two together, in a list; of pieces of running text
        corpus.blocks, which looks like one and reads what is asked for
    at_step(sequences, seed, step) -> the same as this step asks about them; only where it is not always the same
    probe(number, ids, model) -> a Sequence of these tokens, asked as the task asks, without a right answer

    architecture(family) -> what transformers calls the family with the head of this task; None where it has none
    make_head(family, config, n_labels) -> that head (models/__init__.py): the family's own or another
    NAMED_CLASSES     whether config.json names the classes of such a model (id2label); else n_labels is 0, and
        model.labels is empty
    check_settings(settings, wanted, own, path)   raises InputError where a checkpoint's head, whose classes are `own`,
        is for something else; wanted: the classes of the data, or None. Only where NAMED_CLASSES
    settings(model) -> what stands in config.json beside the checkpoint's own
    PEFT_TYPE         PEFT's task_type; PEFT_HEADS: modules that PEFT trains for it without being told
    claims(settings) -> whether a config.json is for this task; only where architecture or PEFT_TYPE are another's too

    loss(model, batch, noise, smoothing) -> (the loss summed over the batch's targets, another sum over them), both ();
        0 for no targets, which a process may get. smoothing: --label-smoothing, for those that have labels
        COUNTED       what the second is called when divided by T: "accuracy" if it counts targets predicted right
    Metrics(model)    .add(batch), .sums (float64, added up over processes), .result() -> {"loss": ..., COUNTED: ...,
        and others by name}; .best = (name, max or min): which of them says that a model is better
        and, where the task has more to tell than numbers, .details() -> a dictionary for JSON, from the same sums
    describe(details, width) -> what these say, in lines of at most `width` columns; only where Metrics has details()
    predictions(model, batch, tokenizer) -> a JSON object for each sequence; None where a task is told by `generate`
    next_command(folder, example, tokenizer) -> the command line that asks the model in a folder, which is written as a
        shell reads it; example: the first of the training examples
    question(example, tokenizer) -> (what is asked about an example, as `predict` or `generate` take it; what is right),
        for reports; None where nothing is asked about it; tokenizer: None if it is only to be shown
    summary(model, sequences) -> sentences said before a training, beside the counts that are said of every task
"""

import importlib
from types import ModuleType

from ..errors import InputError
from ..models import Model
from ..tables import TASKS


def task_named(name: str) -> ModuleType:
    """The file of a task."""
    assert name in TASKS, name
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def task_of(model: Model) -> ModuleType:
    """The file of the task that a model has a head for. Raises InputError where it has none."""
    if model.task is None:
        raise InputError("the model has no head, so nothing can be asked of it; expected load(..., task=...)")
    return task_named(model.task)


def details_of(metrics) -> dict:
    """What a task's Metrics have to tell beside numbers; empty where they do not say."""
    return metrics.details() if hasattr(metrics, "details") else {}


def task_of_architecture(family: ModuleType, settings: dict) -> str | None:
    """The name of the task that a checkpoint's head is for, by its config.json; None: the body alone."""
    architectures = settings.get("architectures") or []
    return claimed([name for name in TASKS if task_named(name).architecture(family) in architectures], settings)


def task_of_peft(task_type: object, settings: dict | None = None) -> str | None:
    """The name of the task that an adapter is for, by PEFT's task_type and the config.json of the adapted model."""
    if task_type is None:  # as PEFT writes it for what it has no name for
        return None
    return claimed([name for name in TASKS if task_named(name).PEFT_TYPE == task_type], settings or {})


def claimed(names: list[str], settings: dict) -> str | None:
    """Of tasks that are called the same elsewhere, the one that claims this config.json, else the first."""
    claims = (name for name in names if hasattr(task_named(name), "claims") and task_named(name).claims(settings))
    return next(claims, names[0] if names else None)
