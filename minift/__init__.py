"""minift: a minimal fine-tuning engine in plain PyTorch.

The public names are loaded at first use, so that `minift --help` does not wait for torch.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

_HOME = {
    "add_lora": "adapters",
    "quantize": "quantize",
    "merge": "merge",
    "load": "hub",
    "save": "hub",
    "train": "train",
    "Run": "train",
    "evaluate": "evaluate",
    "predict": "evaluate",
    "generate": "generate",
    "TrainConfig": "config",
    "GenerateConfig": "config",
    "EvalConfig": "config",
    "PredictConfig": "config",
    "MergeConfig": "config",
    "InputError": "config",
}
__all__ = [*_HOME]


class _Package(types.ModuleType):
    """Keeps `minift.train` the function: importing the file train.py would bind the name to its module."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{self.__name__}.{_HOME[name]}"), name)


sys.modules[__name__].__class__ = _Package
