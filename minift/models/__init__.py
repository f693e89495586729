"""A model: the body of a family (bert.py, gpt2.py) and, for a task, its head."""

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..ops.dropout import SILENT, Noise
from . import bert, gpt2

FAMILIES = {"bert": bert, "gpt2": gpt2}  # by config.json's model_type


class Model(nn.Module):
    """body(batch, noise) -> (M, C); head.features(h) -> (M, C) into the linear layer head.out.

    The rest is what a checkpoint says of itself: `settings` is its config.json, `labels` the names of its classes.
    """

    def __init__(self, settings: dict, config, task: str | None, labels: list[str]):
        super().__init__()
        self.family = FAMILIES[settings["model_type"]]
        self.settings, self.config, self.task, self.labels = settings, config, task, labels
        self.body = self.family.Body(config)
        self.head = self.family.HEADS[task](config, len(labels)) if task else None
        self.tie()

    def tie(self) -> None:
        """Makes a tied head share the embedding's parameter; again after parameters were replaced."""
        if self.tied:
            self.head.out.weight = self.get_parameter(self.head.tied[1])

    @property
    def tied(self) -> bool:
        """Whether the head has no weight of its own."""
        return hasattr(self.head, "tied") and self.config.tie_word_embeddings

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(self, batch: Batch, noise: Noise = SILENT) -> Tensor:
        """Hidden states at batch.rows, (M, C)."""
        return self.body(batch, noise)

    def logits(self, batch: Batch) -> Tensor:
        """What the head says of each row, without dropout: (M, V)."""
        return self.head.out(self.head.features(self(batch)))
