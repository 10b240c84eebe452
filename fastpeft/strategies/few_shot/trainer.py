"""transformers' Trainer with a loss of a method's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

Loss = Callable[[Any, dict[str, Any]], Tensor]
"""From a model and a batch to a mean over the batch."""


class LossTrainer(Trainer):
    """Args: loss: of a batch; given: as Trainer's."""

    def __init__(self, loss: Loss, **given: Any) -> None:
        super().__init__(**given)
        self._loss = loss
        self.loss_is_scaled_for_ga = False  # it is a mean over the batch
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._loss(model, inputs)
        return (loss, {}) if return_outputs else loss
