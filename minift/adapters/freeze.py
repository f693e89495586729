"""Training a part of the model as it is: what else learns beside the head.

full     everything: nothing is frozen
head     nothing: a linear probe, on top of frozen features
bias     every bias (BitFit: Ben Zaken et al., https://arxiv.org/abs/2106.10199)
norm     the layer norms
last-K   the last K transformer layers, and a norm after them
"""

from torch import nn

from ..errors import InputError
from ..layers import LayerNorm
from . import Options


def add(model: nn.Module, options: Options) -> None:
    """Makes the head and what options.method names all that learns; a tied head is the embedding: frozen."""
    policy = options.method
    if policy == "full":
        return
    model.requires_grad_(False)
    parts: list[nn.Module | nn.Parameter] = []
    if model.head is not None:
        parts += [p for p in model.head.parameters() if not (model.tied and p is model.last.weight)]
    if policy == "bias":
        parts += [p for name, p in model.named_parameters() if name.endswith("bias")]
    elif policy == "norm":
        parts += [m for m in model.modules() if isinstance(m, LayerNorm)]
    elif policy != "head":
        layers = next(m for m in model.body.children() if isinstance(m, nn.ModuleList))
        k = int(policy.removeprefix("last-"))
        if not 1 <= k <= len(layers):
            raise InputError(f"--method is {policy}; expected last-1 to last-{len(layers)}, the layers that there are")
        parts += [*layers[-k:], *(m for m in model.body.children() if isinstance(m, LayerNorm))]
    for part in parts:
        part.requires_grad_()
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"--method {policy} trains nothing here: the head is the word embedding, which stays frozen")
