"""Text generation: a prompt in one forward pass, then a token at a time, over the keys and values kept so far.

    next ~ softmax(z / temperature)        at temperature 0 the likeliest token

drawn from the top_k likeliest tokens alone, and of those from the fewest that have top_p of the probability (nucleus
sampling: Holtzman et al., https://arxiv.org/abs/1904.09751); definitions and order as in transformers. What is
drawn is a function of (seed, number of the prompt), whatever else is generated. C width, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import GenerateConfig
from .data.batch import Batch, Sequence, pack
from .data.lines import Faults
from .data.passages import Passage, passages_from, stream_passages
from .data.tokenizer import Tokenizer
from .errors import InputError
from .measure.track import Progress
from .models import Model
from .ops.dropout import MASK, SILENT, mix
from .tasks.complete import ends_of_text, tokens_of

WHY = "since the model reads %d at most"


@dataclass
class Sampling:
    """How the next token is chosen. At least one token always stays to be drawn."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # only the k likeliest tokens (and those as likely as the k-th); 0: off
    top_p: float = 1.0  # of those, the fewest likeliest whose probabilities reach p; 1: off
    seed: int = 0

    def __post_init__(self):
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 <= self.top_p <= 1):  # `not` also refuses nan
            raise ValueError(
                f"temperature is {self.temperature}, top_k {self.top_k}, top_p {self.top_p}; "
                "expected at least 0, at least 0, and 0 to 1"
            )


def generate(
    model: Model, tokenizer: Tokenizer, config: GenerateConfig | list, *, max_tokens: int = 64, **options
) -> Iterator[dict] | list[dict]:
    """{"prompt", "completion"} for each prompt, in order. Raises InputError.

    config: what to complete, of which the completions come one by one; or a list of prompts, of which they come in a
    list: generate(model, tokenizer, ["The capital of Peru is"], max_tokens=8). options: fields of Sampling, for a list.
    The prompt of a chat is its whole history, tokenised as in training; an empty one is end-of-text. All are judged
    before the first is completed.
    """
    if isinstance(config, list):
        prompts = passages_from(config, labelled=False)
        return list(completions(model, tokenizer, prompts, max_tokens, Sampling(**options)))
    config.check()
    if config.prompt:
        prompts = [Passage(((config.prompt, False),), "--prompt")]
    else:
        prompts = stream_passages(config.data, need_label=False, max_line=config.max_line)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    return completions(model, tokenizer, prompts, config.max_tokens, sampling)


def completions(
    model: Model, tokenizer: Tokenizer, prompts: Iterable[Passage], max_tokens: int, sampling: Sampling
) -> Iterator[dict]:
    """What `generate` gives, one by one."""
    if not model.generates:
        raise InputError(f"the model has a head for {model.task or 'nothing'}; expected one that generates text")
    stops = ends_of_text(model, tokenizer)
    count = judge(prompts, model, tokenizer)
    progress = Progress(count, "prompt")
    for number, (prompt, ids, _) in enumerate(tokens_of(prompts, model, tokenizer)):
        tokens = continuation(model, ids or stops[:1], max_tokens, sampling, stops, number)
        yield {"prompt": "".join(text for text, _ in prompt.parts), "completion": tokenizer.decode(tokens)}
        progress.add(note=f"{len(tokens)} tokens")
    progress.close()


def judge(prompts: Iterable[Passage], model: Model, tokenizer: Tokenizer) -> int:
    """How many prompts there are. Raises InputError that names those which leave no room for a completion."""
    longest, count, faults = model.config.longest, 0, Faults()
    for prompt, ids, _ in tokens_of(prompts, model, tokenizer):
        count += 1
        if len(ids) >= longest:
            message = f"the prompt has {len(ids)} tokens; expected at most {longest - 1}, {WHY % longest}"
            faults.add(prompt.where, message)
    faults.check()
    return count


@torch.inference_mode()
def continuation(
    model: Model, ids: list[int], max_tokens: int, sampling: Sampling, stops: list[int] = (), number: int = 0
) -> list[int]:
    """The tokens that continue the prompt `ids`: up to one of `stops` (not included), `max_tokens`, or a full context.

    The context is full when the model has read config.longest tokens; the token it then says is still given.
    number: of the prompt in its file, names its randomness. Raises InputError for an empty or too long prompt.
    """
    if not 0 < len(ids) < model.config.longest:
        raise InputError(
            f"prompt {number} has {len(ids)} tokens; expected 1 to {model.config.longest - 1}, "
            + WHY % model.config.longest
        )
    room = model.config.longest - len(ids) + 1
    cache = model.body.new_cache()
    generator = dice(sampling.seed, number)
    tokens, new = [], ids
    while len(tokens) < min(max_tokens, room):
        h = model.body(ask(new).to(model.device), SILENT, cache)  # (1, C)
        token = choose(model.last(h)[0], sampling, generator)
        if token in stops:
            break
        tokens.append(token)
        new = [token]
    return tokens


def ask(ids: list[int]) -> Batch:
    """The tokens as one sequence that is asked about its last."""
    return pack([Sequence(0, np.array(ids), None, np.array([len(ids) - 1]), np.zeros(1, np.int64))])


def dice(seed: int, number: int) -> torch.Generator:
    """A generator on the CPU, whatever the device of the model: all of them draw the same."""
    word = mix(mix(seed & MASK) ^ seed >> 32 & MASK)  # mixed to 32 bits, since the generator looks at no more
    return torch.Generator().manual_seed(mix(word ^ number & MASK))


def choose(z: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, from the logits z (V,)."""
    if sampling.temperature == 0:
        return int(z.argmax())
    below = probabilities(z, sampling).double().cumsum(0)  # (V,)
    u = torch.rand((), dtype=torch.float64, generator=generator).item()
    return int(torch.searchsorted(below, u * below[-1], right=True))  # right: never a token of probability 0


def probabilities(z: Tensor, sampling: Sampling) -> Tensor:
    """What the next token is drawn from, (V,) in float32, from the logits z (V,); temperature above 0."""
    z = z.float() / sampling.temperature
    if sampling.top_k:
        z[z < z.topk(min(sampling.top_k, len(z))).values[-1]] = -torch.inf
    if sampling.top_p < 1:
        ascending, token = z.sort()
        out = ascending.softmax(0).cumsum(0) <= 1 - sampling.top_p
        out[-1] = False
        z[token[out]] = -torch.inf
    return z.softmax(0)
