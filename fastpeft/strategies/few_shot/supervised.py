"""Plain fine-tuning of a fresh classifier on the few rows: what other methods are to beat."""

from __future__ import annotations

from typing import Any, ClassVar

from fastpeft.training.preparing import Prepared
from fastpeft.training.trainers import build_trainer

from .method import Method


class Supervised(Method):
    """As the task strategy does it."""

    tasks: ClassVar[tuple[str, ...]] = ("sequence-classification",)

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        task = prepared.config.model.task
        return build_trainer(task, model, prepared.tokenizer, arguments, prepared.rows.rows, None, callbacks)

    def fit(self, prepared: Prepared, model: Any) -> None:
        return None
