"""Evaluation and prediction as a stream: memory does not grow with the number of examples."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .config import EvalConfig, PredictConfig
from .data.batch import Batch, Sequence, pack
from .data.examples import Example, at, sample
from .data.tokenizer import Tokenizer
from .measure.track import Progress
from .models import Model, check_length
from .tasks import task_named

TOKENS = 4096  # at once, where nothing else is asked for


def evaluate(model: Model, tokenizer: Tokenizer, config: EvalConfig) -> dict[str, float]:
    """The task's metrics over the labelled examples in config.data. Raises InputError."""
    config.check()
    task = task_named(config.task)
    length = check_length(model, config.max_length)
    examples = task.stream(config.data, config.columns, header=config.header, max_line=config.max_line)
    labels = task.judge(examples, model, tokenizer)  # a first pass over the file, before anything is computed
    chosen = range(len(labels))
    if config.limit:
        chosen = sample(chosen, config.limit, config.seed)
        labels = [labels[i] for i in chosen]
    progress = Progress(len(chosen), "example")
    sequences = task.encoded(at(examples, chosen), labels, model, tokenizer, length)
    result = measure(model, sequences, config.tokens, progress.add)
    progress.close()
    return result


def predict(model: Model, tokenizer: Tokenizer, config: PredictConfig) -> Iterator[dict]:
    """The task's prediction for config.text, or for each example in config.data, in order. Raises InputError."""
    config.check()
    task = task_named(config.task)
    length = check_length(model, config.max_length)
    if config.text:
        examples = [Example(config.text, config.pair or None, None, "--text")]
    else:
        examples = task.stream(config.data, config.columns, False, config.header, config.max_line)
    labels = task.judge(examples, model, tokenizer, labelled=False)  # every fault is told before the first prediction
    sequences = task.encoded(examples, labels, model, tokenizer, length)
    progress = Progress(len(labels), "example")
    for batch in batches(sequences, config.tokens):
        with torch.inference_mode():
            found = task.predictions(model, batch.to(model.device))
        yield from found
        progress.add(len(found))
    progress.close()


def measure(
    model: Model,
    sequences: Iterable[Sequence],
    tokens: int = TOKENS,
    watch: Callable[[int], None] = lambda n: None,
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """The metrics of encoded examples; `watch` hears of each batch how many examples it had.

    add_up: sums the counts over all processes, where each has measured its part.
    """
    metrics = task_named(model.task).Metrics(model)
    for batch in batches(sequences, tokens):
        with torch.inference_mode():
            metrics.add(batch.to(model.device))
        watch(batch.n_examples)
    metrics.sums = add_up(metrics.sums)
    return metrics.result()


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
