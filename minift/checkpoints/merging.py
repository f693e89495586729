"""One model of a base and its adapter, and what that costs.

    original      W + s B A        W as it was before it was packed
    dequantized   W' + s B A       W' what the bits say: the model as it was trained, in float32
    nf4, int8     packed again     as small as the base, with a rounding error larger than most updates

The adapter was trained beside W', so only `dequantized` computes what was trained; for a base that is not packed the
first two are one. W + s B A is LoRA's; of any other adapter it is what its layer's `matrix` and `bias` say.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.targets import wrappers
from ..config import MergeConfig
from ..data.batch import Batch, pack
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..files import check_new_folder
from ..layers import linear_of
from ..layers.packed import PackedLinear, swap
from ..models import Model, check_length
from ..tables import BASES
from ..tasks import task_named
from . import hub, loading, saving

SAMPLE = 16  # sequences that the logits are compared on


@dataclass
class Cost:
    """Relative errors against the model as it was trained: norms of the difference over norms of what it should be."""

    layers: dict[str, float]  # of the weight of each adapted layer, by its hub name
    logits: float
    divergence: float  # mean Kullback-Leibler divergence of the predicted distributions, in nats


def merge(config: MergeConfig) -> tuple[Model, Tokenizer | None, Cost]:
    """Loads the adapted model that `config` names, merges it and compares the two. Raises InputError."""
    config.check()
    model, tokenizer = loading.load(config.model, base_model=config.base_model, fresh_head=False)
    if not model.adapter:
        raise InputError(f"{config.model}: has no adapter; expected a run trained with one, or an adapter folder")
    if not model.task:
        expected = "SEQ_CLS or CAUSAL_LM, whose logits are compared"
        raise InputError(f"{config.model}: says no task (task_type); expected {expected}")
    batch = sample(model, tokenizer, config)
    with torch.no_grad():
        want = model.logits(batch).double()
        cost = Cost(merge_layers(model, config.into), 0.0, 0.0)
        got = model.logits(batch).double()
    cost.logits = ((got - want).norm() / want.norm()).item()
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    cost.divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    return model, tokenizer, cost


def merge_layers(model: Model, into: str) -> dict[str, float]:
    """Replaces each adapted layer, in place, and unpacks (or packs) the others; each adapted layer's relative error."""
    originals = original_weights(model) if into == "original" else {}
    errors = {}
    for name, layer in wrappers(model).items():
        want = layer.matrix(torch.float32)
        if name in originals:
            layer.set_frozen(linear_of(originals[name], layer.frozen.bias))
        new = linear_of(layer.matrix(torch.float32), layer.bias)
        model.set_submodule(name, new)
        if into in BASES:
            new = swap(model, name, into)
            new.pack(want)
        errors[model.hub_name(name)] = ((new.matrix(torch.float32) - want).norm() / want.norm()).item()
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]:
        if layer.BASE == into:
            continue
        weight = originals.get(name)
        if weight is None:
            weight = layer.matrix(torch.float32).clone()  # else the next layer's would take its memory
        model.set_submodule(name, linear_of(weight, layer.bias))
        if into in BASES:
            swap(model, name, into).pack(weight)
    model.adapter = None
    model.requires_grad_()
    return errors


def original_weights(model: Model) -> dict[str, Tensor]:
    """Our name -> the weight before packing, of every layer that is packed."""
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not packed:
        return {}
    source = hub.resolve(model.adapter.base)
    if "quantization_config" in hub.read_settings(source):
        raise InputError(
            f"--into is original, but {source} is packed itself; expected dequantized, {' or '.join(BASES)}"
        )
    base, _ = loading.load(source, model.task, model.labels, base="fp32")
    outer = wrappers(model)  # a packed layer inside one had its name before it was wrapped
    names = {next((name for name in outer if inner.startswith(f"{name}.")), inner) for inner in packed}
    return {name: base.get_parameter(f"{name}.weight") for name in names}


def sample(model: Model, tokenizer: Tokenizer | None, config: MergeConfig) -> Batch:
    """Examples of config.data, or sequences of random tokens."""
    task = task_named(model.task)
    length = min(32, model.config.longest)
    if config.data:
        if tokenizer is None:
            raise InputError(f"{config.model}: no tokenizer to read --data with")
        # a completion is needed, since that is what is asked about; of a task with predictions, what is right is not
        need = task.predictions is None
        chosen = []
        for example in task.stream(config.data, config.columns, need, config.header, config.max_line):
            if len(chosen) < SAMPLE:  # the rest is only judged
                chosen.append(example)
        return pack(task.encode(chosen, model, tokenizer, check_length(model, 0), labelled=False))
    ids = torch.randint(model.config.vocab_size, (SAMPLE, length), generator=torch.Generator().manual_seed(0))
    return pack([task.probe(i, x.int().numpy(), model) for i, x in enumerate(ids)])


def write(config: MergeConfig) -> Cost:
    """merge, and the model saved in config.out. Raises InputError, also where something else is there."""
    out = Path(config.out)
    check_new_folder("--out", out)
    model, tokenizer, cost = merge(config)
    saving.save(model, tokenizer, out)
    return cost
