"""Evaluation and prediction as a stream: memory does not grow with the number of examples."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import data
from .batch import Batch, Sequence, pack
from .config import EvalConfig, InputError, PredictConfig
from .data import Example
from .models import Model
from .tasks import TASKS
from .tokenizer import Tokenizer
from .track import Progress

TOKENS = 4096  # at once, where nothing else is asked for


def evaluate(model: Model, tokenizer: Tokenizer, config: EvalConfig) -> dict[str, float]:
    """The task's metrics over the labelled examples in config.data. Raises InputError."""
    config.check()
    examples = data.read(config.data, config.columns)
    if config.limit:
        examples = data.sample(examples, config.limit, config.seed)
    sequences = TASKS[config.task].encode(examples, model, tokenizer, check_length(model, config.max_length))
    progress = Progress(len(sequences), "example")
    result = measure(model, sequences, config.tokens, progress.add)
    progress.close()
    return result


def predict(model: Model, tokenizer: Tokenizer, config: PredictConfig) -> Iterator[dict]:
    """The task's prediction for config.text, or for each example in config.data, in order. Raises InputError."""
    config.check()
    if config.text:
        examples = [Example(config.text, config.pair or None, None, "--text")]
    else:
        examples = data.read(config.data, config.columns, need_label=False)
    sequences = TASKS[config.task].encode(
        examples, model, tokenizer, check_length(model, config.max_length), labelled=False
    )
    progress = Progress(len(sequences), "example")
    for batch, z in logits(model, sequences, config.tokens):
        yield from TASKS[config.task].predictions(model, z)
        progress.add(len(batch.offsets) - 1)
    progress.close()


def measure(
    model: Model, sequences: list[Sequence], tokens: int = TOKENS, watch: Callable[[int], None] = lambda n: None
) -> dict[str, float]:
    """The metrics of encoded examples; `watch` hears of each batch how many examples it had."""
    metrics = TASKS[model.task].Metrics(model)
    for batch, z in logits(model, sequences, tokens):
        metrics.add(z, batch.targets)
        watch(len(batch.offsets) - 1)
    return metrics.result()


def logits(model: Model, sequences: list[Sequence], tokens: int) -> Iterator[tuple[Batch, Tensor]]:
    """(batch, logits (M, V)) of consecutive sequences, at most about `tokens` tokens at a time, without dropout."""
    group, size = [], 0
    for sequence in [*sequences, None]:  # None: the end
        if group and (sequence is None or size + len(sequence) > tokens):
            batch = pack(group).to(model.device)
            with torch.inference_mode():
                z = model.logits(batch)
            yield batch, z
            group, size = [], 0
        if sequence is not None:
            group.append(sequence)
            size += len(sequence)


def check_length(model: Model, max_length: int) -> int:
    """`--max-length` in tokens: 0 stands for the length the model was fine-tuned with, else 512 or its limit."""
    longest = model.config.longest
    if max_length > longest:
        raise InputError(f"--max-length is {max_length}; expected at most {longest}, the positions that the model has")
    return max_length or model.settings.get("minift", {}).get("max_length") or min(512, longest)
