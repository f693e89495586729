"""minift: a minimal fine-tuning engine in plain PyTorch.

The public names are loaded at first use, so that `minift --help` does not wait for torch.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "add_lora": "adapters.lora",
    "adapt": "adapters",
    "quantize": "layers.packed",
    "merge": "checkpoints.merging",
    "load": "checkpoints.loading",
    "save": "checkpoints.saving",
    "prepare": "setup",
    "train": "training",
    "train_step": "training",
    "Run": "measure.summary",
    "evaluate": "evaluation",
    "predict": "evaluation",
    "generate": "generation",
    "TrainConfig": "config",
    "GenerateConfig": "config",
    "EvalConfig": "config",
    "PredictConfig": "config",
    "MergeConfig": "config",
    "InputError": "errors",
}
__all__ = [*_HOME]


def __getattr__(name: str):
    """A public name, at its first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
