"""Everything that is chosen by name, a line each: this is where a fork adds its one line.

The file of a choice has its name: the task "classify" is minift/tasks/classify.py, the family "gpt2" is
minift/models/gpt2.py. What such a file has to contain stands in the docstring of its folder's __init__.py.
Nothing here imports torch, so that the command line answers at once.
"""

import re
from dataclasses import dataclass

# `--task`
TASKS = {
    "classify": "one label for a text or a pair of texts",
    "fill": "the tokens behind masks, from text alone",
    "complete": "the text after a prompt, the answers in a chat, or running text",
}

# config.json's model_type
FAMILIES = {
    "bert": "BERT",
    "gpt2": "GPT-2",
    "roberta": "RoBERTa",
    "distilbert": "DistilBERT",
}


# models that ship with minift, as `--model builtin:NAME`, each a folder in demo/models/; without --model, the first of
# them that has a head for the task
BUILTIN = {
    "bert-nano": "a BERT that has read 49,000 film reviews",
    "gpt2-nano": "a GPT-2 that has read the same",
}

# `--base`: how a frozen base is packed into few bits, a file each in layers/; layers/packed.py says what it has
BASES = {  # the more bits, the earlier: --fit tries them in this order
    "int8": "8 bits",
    "nf4": "4 bits",
}


@dataclass(frozen=True)
class Method:
    """One way to train: a file in adapters/, and what can be told of it without reading that."""

    file: str
    help: str
    base: str = "any"  # how frozen weights may be stored: "any", "unpacked" (all of them learn), "packed" (4 bits only)


# `--method`; the K of last-K stands for a number
METHODS = {
    "full": Method("freeze", "everything", base="unpacked"),
    "lora": Method("lora", "low-rank updates of --targets, and a classifier's last layer"),
    "dora": Method("dora", "LoRA with a learned length for each row of the weight"),
    "pissa": Method("pissa", "LoRA that begins at the largest singular values of the weight"),
    "loftq": Method("loftq", "LoRA that begins by making up for the error of 4 bits", base="packed"),
    "lora-fa": Method("lora_fa", "LoRA whose A stays as it was drawn"),
    "ia3": Method("ia3", "a factor for each channel of --targets, and a classifier's last layer"),
    "head": Method("freeze", "the head alone, on frozen features"),
    "bias": Method("freeze", "the head and every bias (BitFit)"),
    "norm": Method("freeze", "the head and the layer norms"),
    "last-K": Method("freeze", "the head and the last K layers", base="unpacked"),
}


# a file each in engine/optimizers/, whose __init__.py says what such a file has
OPTIMIZERS = {
    "adamw": "Adam with decoupled weight decay",
    "sgd": "momentum beta1, decay as part of the gradient (default --lr: 100 times AdamW's)",
    "lion": "steps by the gradient's sign, one state instead of two (default --lr: 0.2 times AdamW's)",
    "muon": "hidden matrices by orthogonalised momentum (beta1), the rest by AdamW (beta2, eps)",
}

# a function each in engine/schedules.py
SCHEDULES = {
    "linear": "down to 0 in a straight line",
    "cosine": "down to 0 along half a cosine",
    "constant": "stays at its peak",
}


def method_named(name: str) -> Method | None:
    """The method that `--method` calls `name`, or None where there is none of this name."""
    if name in METHODS and not name.endswith("-K"):
        return METHODS[name]
    if re.fullmatch(r".*-[1-9][0-9]{0,5}", name):
        return METHODS.get(f"{name.rpartition('-')[0]}-K")
    return None
