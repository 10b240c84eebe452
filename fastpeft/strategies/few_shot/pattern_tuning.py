"""The word in a pattern's slot tells the class: PET (Schick and Schütze 2021, arXiv 2001.07676).

Of PET, this is the training with one pattern; unlabelled texts and ensembles of patterns are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.errors import UserError
from fastpeft.training.evaluating import evaluating
from fastpeft.training.loading import load_model
from fastpeft.training.preparing import Prepared, Raw

from .demonstrations import with_demonstrations
from .embedding import padded
from .ia3 import attach_ia3
from .method import Method, Scores, classes_of, loss_trainer
from .pattern import Pattern, check_words, tokens_of, words_of
from .worded import Worded


class PatternTuning(Method):
    """Cross-entropy over the classes' words in the slot."""

    tasks: ClassVar[tuple[str, ...]] = ("masked-lm", "causal-lm", "seq2seq-lm")
    whole: ClassVar[bool] = False
    adapter: ClassVar[str] = "lora"

    def check(self) -> None:
        Pattern(self.options.pattern, "masked-lm").check()

    def fill(self, raw: Raw) -> Callable[[dict[str, Any]], dict[str, Any]]:
        if raw.task == "masked-lm" and raw.tokenizer.mask_token is None:
            raise UserError("model.name: expected a tokenizer with a mask token, got one without")
        pattern, tokenizer = Pattern(self.options.pattern, raw.task), raw.tokenizer
        pattern.check()
        self._unread = "text_pair" in raw.rows.column_names and not pattern.pairs
        labels = raw.data.labels or []
        words = words_of(labels, self.options.verbaliser)
        check_words(labels, words, tokens_of(pattern, words, tokenizer), single=not self.whole)
        settings = {"pattern": pattern.text, "words": words, "whole": self.whole, "calibrate": self.options.calibrate}
        self.classifier = Worded.made(settings, raw.task, tokenizer)
        assert raw.data.max_length is not None
        limit = self.classifier.room(raw.data.max_length)

        def fill(row: dict[str, Any]) -> dict[str, Any]:
            text, pair = str(row["text"]), row.get("text_pair")
            prompt = pattern.fit(text, pair, tokenizer, limit)
            return {"text": prompt, "label": row["label"], "source": text, "source_pair": pair}

        return fill

    def notes(self) -> list[str]:
        found = []
        if self._adapter == "ia3":
            found.append(
                "(IA)³ is trained in place of LoRA: the settings of lora, but for modules_to_save, are not used"
            )
        if self._unread:
            found.append(
                "rows have a text_pair, which strategy.options.pattern has no slot {text_pair} for: it is not read"
            )
        return found

    @property
    def _adapter(self) -> str:
        return self.options.adapter or self.adapter

    def load(self, prepared: Prepared, device: Any, dtype: Any) -> Any:
        if self._adapter == "ia3":
            return load_model(prepared, device, dtype, self.change, attach_ia3)
        return super().load(prepared, device, dtype)

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        tokenizer = prepared.tokenizer
        if arguments.world_size > 1 and self.classifier.pattern.task == "seq2seq-lm":  # whose encoder runs by itself
            raise UserError(
                f"strategy.options.method: {self.options.method} of an encoder-decoder expected one process, "
                f"got {arguments.world_size}"
            )

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            return padded(tokenizer, rows) | {"labels": torch.tensor([row["labels"] for row in rows])}

        def loss(model: Any, batch: dict[str, Any]) -> Tensor:
            given = {name: value for name, value in batch.items() if name != "labels"}
            return self.loss(model, tokenizer, given, batch["labels"])

        return loss_trainer(loss, prepared, model, arguments, callbacks, prepared.rows.rows, collate)

    def loss(self, model: Any, tokenizer: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Of prompts and their classes' numbers, (rows,)."""
        return torch.nn.functional.cross_entropy(self.classifier.class_scores(model, tokenizer, batch), labels)

    def fit(self, prepared: Prepared, model: Any) -> Worded:
        return self.classifier

    def baselines(self, prepared: Prepared, model: Any) -> dict[str, list[int]]:
        """The model as it was loaded: without examples and, where it reads from left to right, with some."""
        found = {"no examples, no training": classes_of(self.classifier, prepared, model)}
        count = self.options.demonstrations
        if count == 0 or prepared.config.model.task == "masked-lm":
            return found
        assert prepared.evaluation is not None
        size = prepared.config.training.per_device_eval_batch_size
        for nearest in (False, True):
            rows = with_demonstrations(prepared, self.classifier, count, nearest=nearest)
            with evaluating(prepared, model):
                scores: Scores = self.classifier.scores(model, prepared.tokenizer, rows, size)
            kind = "nearest" if nearest else "random"
            found[f"in context, {kind} examples"] = scores.argmax(-1).tolist()
        return found
