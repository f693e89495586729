"""Evaluation and prediction as a stream: memory does not grow with the number of examples."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .config import EvalConfig, PredictConfig
from .data.batch import Batch, Sequence, pack
from .data.examples import Example, at, sample
from .data.tokenizer import Tokenizer
from .errors import InputError
from .measure.track import Progress
from .models import Model, check_length
from .tasks import details_of, task_of

TOKENS = 4096  # at once, where nothing else is asked for


def evaluate(
    model: Model, tokenizer: Tokenizer, config: EvalConfig | list, *, tokens: int = TOKENS, max_length: int = 0
) -> dict:
    """The task's metrics over labelled examples. Raises InputError.

    The numbers come first; what else the task has to tell, such as the figures of each label, stands behind them.

    config: what to measure, or a list of examples: {"text": ..., "label": ...} or as else the lines of a .jsonl are.
    tokens, max_length: the options of that name, for a list.
    """
    task = task_of(model)
    if isinstance(config, list):
        examples = task.from_rows(config)
        config = EvalConfig(tokens=tokens, max_length=max_length)
        config.check()
    else:
        config.check()
        examples = task.stream(config.data, config.columns, header=config.header, max_line=config.max_line)
    length = check_length(model, config.max_length)

    # a first pass judges everything, before anything is computed
    labels = task.judge(examples, model, tokenizer)
    chosen = range(len(labels))
    if config.limit:
        chosen = sample(chosen, config.limit, config.seed)
        labels = [labels[i] for i in chosen]
    progress = Progress(len(chosen), "example")
    sequences = task.encoded(at(examples, chosen), labels, model, tokenizer, length)
    metrics = measure(model, sequences, config.tokens, progress.add)
    progress.close()
    return metrics.result() | details_of(metrics)


def predict(
    model: Model, tokenizer: Tokenizer, config: PredictConfig | list, *, tokens: int = TOKENS, max_length: int = 0
) -> Iterator[dict] | list[dict]:
    """The task's prediction for each example, in order. Raises InputError.

    config: what to predict, of which the predictions come one by one; or a list of texts, ("text", "its pair"), or as
    else the lines of a .jsonl are, of which they come in a list. tokens, max_length: the options, for a list.
    """
    task = task_of(model)
    if task.predictions is None:
        raise InputError(f"a model for the task {model.task} predicts nothing; expected `generate`")
    if isinstance(config, list):
        examples = task.from_rows(config, labelled=False)
        return list(predictions(model, tokenizer, examples, check_length(model, max_length), tokens))
    config.check()
    if config.text:
        examples = [Example(config.text, config.pair or None, None, "--text")]
    else:
        examples = task.stream(config.data, config.columns, False, config.header, config.max_line)
    return predictions(model, tokenizer, examples, check_length(model, config.max_length), config.tokens)


def predictions(model: Model, tokenizer: Tokenizer, examples: Iterable, max_length: int, tokens: int) -> Iterator[dict]:
    """The prediction for each example, some of them computed at a time."""
    task = task_of(model)
    labels = task.judge(examples, model, tokenizer, labelled=False)  # every fault is told before the first prediction
    sequences = task.encoded(examples, labels, model, tokenizer, max_length)
    progress = Progress(len(labels), "example")
    for batch in batches(sequences, tokens):
        with torch.inference_mode():
            found = task.predictions(model, batch.to(model.device), tokenizer)
        yield from found
        progress.add(len(found))
    progress.close()


def measure(
    model: Model,
    sequences: Iterable[Sequence],
    tokens: int = TOKENS,
    watch: Callable[[int], None] = lambda n: None,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Any:
    """The task's Metrics of encoded examples; `watch` hears of each batch how many examples it had.

    add_up: sums the counts over all processes, where each has measured its part.
    """
    metrics = task_of(model).Metrics(model)
    for batch in batches(sequences, tokens):
        with torch.inference_mode():
            metrics.add(batch.to(model.device))
        watch(batch.n_examples)
    metrics.sums = add_up(metrics.sums)
    return metrics


def batches(sequences: Iterable[Sequence], tokens: int) -> Iterator[Batch]:
    """Consecutive sequences, about `tokens` tokens at a time: at most, but for a sequence that alone is longer."""
    group, size = [], 0
    for sequence in sequences:
        if group and size + len(sequence) > tokens:
            yield pack(group)
            group, size = [], 0
        group.append(sequence)
        size += len(sequence)
    if group:
        yield pack(group)
