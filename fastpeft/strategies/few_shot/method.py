"""What a few-shot method decides: its rows, its model, its loss, and what becomes of the trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fastpeft.config import FastpeftConfig, LoraSection
from fastpeft.models.devices import pick_device
from fastpeft.training.evaluating import evaluating
from fastpeft.training.loading import load_model
from fastpeft.training.preparing import Prepared, Raw

from .drawing import Pool
from .embedding import embed, padded
from .options import FewShotOptions
from .trainer import Loss, LossTrainer

Scores = NDArray[np.float32]


class Classifier(Protocol):
    """A trained model's use."""

    def scores(self, model: Any, tokenizer: Any, rows: Any, batch_size: int) -> Scores:
        """(rows, classes), of encoded rows; their softmax are the probabilities. The model is evaluating."""

    def save(self, folder: Path, labels: list[str]) -> None:
        """What `read` needs beside the adapter."""


class Method:
    """One way to learn from few rows.

    Attributes:
        tasks: values of `model.task` that it serves; the first that fits the model is taken.
        options, config: of the run; the configuration as resolved once the data is read.
    """

    tasks: ClassVar[tuple[str, ...]]

    def __init__(self, options: FewShotOptions, config: FastpeftConfig) -> None:
        self.options, self.config = options, config

    def check(self) -> None:
        """Raises UserError for what can be told from the configuration alone to be wrong."""

    def measured(self, labels: Sequence[str]) -> list[str]:
        """The classes that are drawn and measured, of all."""
        return list(labels)

    def notes(self) -> list[str]:
        """What should be looked at."""
        return []

    def begin(self, prepared: Prepared, pool: Pool) -> None:
        """Once the data is read: what a method wants of the rows that are not drawn."""

    def fill(self, raw: Raw) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """How a row is changed before it is encoded; None where it is not. May refuse by UserError."""
        return None

    def load(self, prepared: Prepared, device: Any, dtype: Any) -> Any:
        """The model with what is trained in it, accelerated."""
        return load_model(prepared, device, dtype, self.change)

    def change(self, base: Any, section: LoraSection) -> LoraSection:
        """As `Strategy.change`."""
        return section

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        """For the rows of one draw."""
        raise NotImplementedError

    def fit(self, prepared: Prepared, model: Any) -> Classifier | None:
        """What is made of the trained model and the rows of its draw; None where the model is the classifier."""
        raise NotImplementedError

    def baselines(self, prepared: Prepared, model: Any) -> dict[str, list[int]]:
        """The class of each row that is measured on, by ways that need no training; the model is as loaded."""
        return {}


def classes_of(classifier: Classifier, prepared: Prepared, model: Any) -> list[int]:
    """The likeliest class of each row that is measured on."""
    assert prepared.evaluation is not None
    size = prepared.config.training.per_device_eval_batch_size
    with evaluating(prepared, model):
        scores = classifier.scores(model, prepared.tokenizer, prepared.evaluation.rows, size)
    found: list[int] = scores.argmax(-1).tolist()
    return found


def embeddings(model: Any, tokenizer: Any, rows: Any, batch_size: int) -> Scores:
    """(rows, width) of encoded rows; the model is evaluating."""
    device, found = pick_device(), []
    for start in range(0, len(rows), batch_size):
        chosen = [rows[place] for place in range(start, min(start + batch_size, len(rows)))]
        batch = {name: value.to(device) for name, value in padded(tokenizer, chosen).items()}
        found.append(embed(model, batch).cpu())
    return torch.cat(found).numpy()


def loss_trainer(
    loss: Loss, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any], rows: Any, collator: Any
) -> LossTrainer:
    """A trainer over `rows`, which `collator` makes batches of that `loss` takes."""
    return LossTrainer(
        loss,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        processing_class=prepared.tokenizer,
        callbacks=callbacks,
    )
