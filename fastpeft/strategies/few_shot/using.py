"""What a few-shot run left beside its adapter, in use: classes of new texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastpeft.errors import UserError

from .heads import SETTINGS, WEIGHTS, LinearHead, read_settings

if TYPE_CHECKING:
    from fastpeft.generation import Prompt
    from fastpeft.models.tuned import Source

    from .method import Classifier


TASKS = {"embedded": ("feature-extraction",), "worded": ("masked-lm", "causal-lm", "seq2seq-lm")}
"""What models each kind of classifier is of."""


@dataclass(frozen=True)
class Saved:
    """What is in a run's folder.

    Attributes:
        folder: of the adapter.
        settings: as they were saved.
    """

    folder: Path
    settings: dict[str, Any]

    def predictions(
        self, source: Source, model: Any, tokenizer: Any, prompts: list[Prompt], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """Each text with its class and the classes' probabilities, the likeliest first."""
        import torch

        labels = self.settings["labels"]
        classifier, rows = self._read(source, tokenizer, prompts)
        for start in range(0, len(rows), batch_size):
            with torch.no_grad():
                scores = classifier.scores(model, tokenizer, rows[start : start + batch_size], batch_size)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            for prompt, row in zip(prompts[start:], shares / shares.sum(-1, keepdims=True), strict=False):
                order = np.argsort(-row, kind="stable")
                pair = {} if prompt.pair is None else {"text_pair": prompt.pair}
                found = {labels[place]: float(row[place]) for place in order}
                yield {"text": prompt.given, **pair, "label": labels[order[0]], "scores": found}

    def _read(self, source: Source, tokenizer: Any, prompts: list[Prompt]) -> tuple[Classifier, list[dict[str, Any]]]:
        """(the classifier, encoded rows)."""
        limit = source.max_length or tokenizer.model_max_length
        if self.settings["kind"] == "embedded":
            from .contrastive import Embedded

            cut = {"truncation": True, "max_length": limit, "verbose": False}
            head = self._head(source.config.hidden_size)
            return Embedded(head), [dict(tokenizer(prompt.given, prompt.pair, **cut)) for prompt in prompts]
        from .worded import Worded

        worded = Worded.made(self.settings, source.task, tokenizer)
        rows = []
        for prompt in prompts:
            text = worded.pattern.fit(prompt.given, prompt.pair, tokenizer, worded.room(limit))
            rows.append(dict(tokenizer(text, verbose=False)))
        return worded, rows

    def _head(self, width: int) -> LinearHead:
        try:
            head = LinearHead.load(self.folder)
        except (OSError, ValueError) as error:
            raise UserError(f"MODEL: {self.folder / WEIGHTS} cannot be read: {error}") from error
        expected = len(self.settings["labels"]), width
        if head.weight.shape != expected:
            raise UserError(
                f"MODEL: {self.folder / WEIGHTS}: expected weight of shape {expected}, a row for each class and a "
                f"column for each of the model's hidden values, got {head.weight.shape}"
            )
        return head


def saved_by(source: Source) -> Saved | None:
    """What a few-shot run saved; None for any other model."""
    if source.adapter is None or not Path(source.adapter).is_dir():
        return None
    folder = Path(source.adapter)
    try:
        settings = read_settings(folder)
    except ValueError as error:
        raise UserError(f"MODEL: {folder / SETTINGS} cannot be read: {error}") from error
    if settings is None:
        return None
    expected = TASKS[settings["kind"]]
    if source.task not in expected:
        raise UserError(
            f"MODEL: {folder / SETTINGS}: expected an adapter for task {' or '.join(expected)}, got {source.task}"
        )
    return Saved(folder, settings)
