"""Pairs of texts teach an encoder which belong together; logistic regression on its embeddings tells the classes.

SetFit's method (Tunstall et al. 2022, arXiv 2209.11055).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor

from fastpeft.config import LoraSection
from fastpeft.training.evaluating import evaluating
from fastpeft.training.preparing import Prepared

from .embedding import embed, padded
from .heads import LinearHead, centroids, logistic_regression, write_settings
from .method import Classifier, Method, Scores, embeddings, loss_trainer

TASK = "feature-extraction"


@dataclass(frozen=True)
class Embedded:
    """A classifier: a linear head on embeddings."""

    head: LinearHead

    def scores(self, model: Any, tokenizer: Any, rows: Any, batch_size: int) -> Scores:
        return self.head.scores(embeddings(model, tokenizer, rows, batch_size))

    def save(self, folder: Path, labels: list[str]) -> None:
        self.head.save(folder)
        write_settings(folder, {"kind": "embedded", "labels": labels})


@dataclass(frozen=True)
class _Known:
    """A head over embeddings that are there already."""

    head: LinearHead
    vectors: Scores

    def guesses(self) -> list[int]:
        found: list[int] = self.head.scores(self.vectors).argmax(-1).tolist()
        return found


class Contrastive(Method):
    """The cosine of two texts of one class is taught to be 1, of two classes 0, by its squared error."""

    tasks: ClassVar[tuple[str, ...]] = (TASK,)

    def change(self, base: Any, section: LoraSection) -> LoraSection:
        return without_pooler(base, section)

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        rows = prepared.rows.rows
        drawn = pairs(rows["labels"], self.options.pairs, prepared.config.training.seed)
        collator = PairCollator(list(rows), prepared.tokenizer)
        return loss_trainer(cosine_loss, prepared, model, arguments, callbacks, drawn, collator)

    def fit(self, prepared: Prepared, model: Any) -> Classifier:
        vectors, labels = self._embedded(prepared, model)
        return Embedded(logistic_regression(vectors, labels))

    def baselines(self, prepared: Prepared, model: Any) -> dict[str, list[int]]:
        """Of the encoder as it was loaded, with the same rows."""
        vectors, labels = self._embedded(prepared, model)
        if not hasattr(self, "_frozen"):  # the same for every draw
            assert prepared.evaluation is not None
            self._frozen = self._embedded(prepared, model, prepared.evaluation.rows)[0]
        return {
            "prototypes": _Known(centroids(vectors, labels), self._frozen).guesses(),
            "logistic regression alone": _Known(logistic_regression(vectors, labels), self._frozen).guesses(),
        }

    def _embedded(self, prepared: Prepared, model: Any, rows: Any = None) -> tuple[Scores, Any]:
        rows = prepared.rows.rows if rows is None else rows
        size = prepared.config.training.per_device_eval_batch_size
        with evaluating(prepared, model):
            return embeddings(model, prepared.tokenizer, rows, size), rows["labels"]


def without_pooler(base: Any, section: LoraSection) -> LoraSection:
    """No adapter where nothing comes from: embeddings are means of tokens."""
    if getattr(base, "pooler", None) is None:
        return section
    from dataclasses import replace

    return replace(section, exclude_modules=[*section.exclude_modules, "pooler.dense"])


def pairs(labels: Sequence[int], each: int, seed: int) -> Any:
    """`each` pairs alike and as many unlike that begin with each text.

    Args:
        labels: of the texts.
        seed: of the draw.

    Returns:
        A `datasets.Dataset` of first and second (places of texts) and labels (1.0 alike, 0.0 unlike). A class with one
        text has no pairs alike.
    """
    generator = random.Random(f"pairs {seed}")
    places = range(len(labels))
    found: list[tuple[int, int, float]] = []
    for first in places:
        for alike in (True, False):
            others = [place for place in places if place != first and (labels[place] == labels[first]) == alike]
            for _ in range(each if others else 0):
                found.append((first, generator.choice(others), float(alike)))
    first_ones, seconds, same = zip(*found, strict=True)
    return datasets.Dataset.from_dict({"first": first_ones, "second": seconds, "labels": same})


@dataclass(frozen=True)
class PairCollator:
    """From pairs to their texts, each once however often a batch has it, and where each pair's are."""

    rows: list[dict[str, Any]]
    tokenizer: Any

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        used = sorted({pair[name] for pair in batch for name in ("first", "second")})
        where = {place: number for number, place in enumerate(used)}
        sides = {name: torch.tensor([where[pair[name]] for pair in batch]) for name in ("first", "second")}
        labels = torch.tensor([pair["labels"] for pair in batch])
        return padded(self.tokenizer, [self.rows[place] for place in used]) | sides | {"labels": labels}


def cosine_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Mean squared error of the cosines of pairs.

    Args:
        batch: a padded batch of texts, first and second (pairs,) places of texts in it, labels (pairs,) in 0 to 1.
    """
    texts = {name: value for name, value in batch.items() if name not in ("first", "second", "labels")}
    vectors = embed(model, texts)
    cosines = (vectors[batch["first"]] * vectors[batch["second"]]).sum(-1)
    return torch.nn.functional.mse_loss(cosines, batch["labels"].to(cosines.dtype))
