"""A trainer whose loss rules may weight token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from .actions import Action
from .losses import token_losses


class Steered:
    """Mixed in before a class of trainers; what is logged, and evaluations, have the plain loss.

    Attributes:
        task: what the model is trained to do.
        weighing: rules that weight tokens; without any the trainer's own loss is taken.
        step_loss: 0-d, the plain loss of the step so far; None before its first batch.
    """

    task: str
    weighing: Sequence[Action] = ()
    step_loss: Any = None
    _plain: Any = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if self.weighing:
            loss = self._plain
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        if not self.weighing or not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        anchor = max((getattr(rule, "anchor", 0.0) for rule in self.weighing), default=0.0)
        tokens = token_losses(model, inputs, self.task, anchored=anchor > 0)
        loss = tokens.nll
        for rule in self.weighing:
            if (factors := rule.weights(tokens)) is not None:
                loss = loss * factors
        if tokens.divergence is not None:
            loss = loss + anchor * tokens.divergence
        scaled = num_items_in_batch is not None
        count = num_items_in_batch if scaled else tokens.counted.sum().clamp(min=1)
        batches = 1 if scaled else trainer.current_gradient_accumulation_steps
        self._plain = tokens.nll.detach().sum() / count / batches
        return loss.sum() / count


@cache
def _steered(kind: type[Any]) -> type[Any]:
    return type(kind.__name__, (Steered, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def steer(trainer: Any, task: str, rules: Sequence[Action]) -> None:
    """Have a trainer, just built, ask rules for its loss."""
    kind: Any = type(trainer)
    trainer.__class__ = _steered(kind)
    trainer.task, trainer.weighing = task, [rule for rule in rules if rule.weighs]
