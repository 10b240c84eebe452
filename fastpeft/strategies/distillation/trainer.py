"""The trainer of any task, its loss the student's distance from the teacher."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastpeft.layers.without_logits import lazily
from fastpeft_kernels.loss import TopLogits

from .losses import IGNORED, Ways, token_loss
from .matching import Matching
from .stored import StoredTeacher
from .teacher import Teacher

STORED = "teacher_logits", "teacher_words"
OWN = "own_answers"
"""Keys of a batch: its tokens' stored logits, and whether the student wrote it."""


@dataclass
class Lesson:
    """What a step learns.

    Attributes:
        teacher: asked in every step; None where its logits are stored.
        stored: those.
        ways: how divergence and labels make a loss.
        matching: of inner states; None for none.
        task: of the model.
        on_policy: share of the steps on the student's own answers.
        max_new_tokens: of these.
        padding: the tokenizer's padding token.
    """

    teacher: Teacher | None
    stored: StoredTeacher | None
    ways: Ways
    matching: Matching | None
    task: str
    on_policy: float = 0.0
    max_new_tokens: int = 0
    padding: int = 0

    def loss(self, model: Any, inputs: dict[str, Any], items: Any = None) -> Tensor:
        """0-d: a mean over the tokens (rows, for classes) with a label, or their sum divided by `items`."""
        batch = dict(inputs)
        ways = replace(self.ways, labels=0.0) if batch.pop(OWN, False) else self.ways  # nobody says that they are right
        labels = batch.pop("labels")
        wanted = {} if self.matching is None else self.matching.wanted
        stored = [batch.pop(name) for name in STORED if name in batch]
        if self.task == "causal-lm":
            batch["use_cache"] = False
        said: Any = None
        teacher: Tensor | TopLogits
        if stored:
            teacher = TopLogits(*stored)
        else:
            assert self.teacher is not None
            with self.teacher.asked() as asked, _lazily(asked, self.ways):
                said = asked(**batch, **wanted)
                teacher = self._tokens(said.logits, labels)
        with _lazily(model, self.ways):
            answered = model(**batch, **wanted)
            student = self._tokens(answered.logits, labels)
        flat = self._labels(labels)
        loss = token_loss(student, teacher, flat, ways)
        loss = loss / ((flat != IGNORED).sum().clamp(min=1) if items is None else items)
        if self.matching is not None:
            # a mean over the batch: of several batches that make a step, each counts by its tokens
            share = 1.0 if items is None else (flat != IGNORED).sum() / items
            loss = loss + share * self.matching.loss(answered, said, batch.get("attention_mask"))
        return loss

    def _tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(tokens, words) beside `_labels`; lazy logits stay lazy."""
        if self.task == "sequence-classification":
            return logits
        if self.task == "causal-lm":
            logits = logits[:, :-1]
        return logits.reshape(-1, logits.shape[-1])

    def _labels(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] if self.task == "causal-lm" else labels).reshape(-1)


def distilling(lesson: Lesson) -> Callable[[type], Any]:
    """Makes of a class of trainers one that learns the lesson. Evaluations have the labels' own loss, as ever."""

    def made(base: type) -> Any:
        kind: Any = base

        class Distilling(kind):  # type: ignore[misc]
            data_collator: Any

            def compute_loss(
                self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
            ) -> Any:
                if not model.training:
                    return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                loss = lesson.loss(model, inputs, num_items_in_batch)
                if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                    loss = loss * self.accelerator.num_processes
                return loss

            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                if lesson.on_policy and random.random() < lesson.on_policy:
                    items = answered_tokens = None
                    inputs = own_answers(self, model, self._prepare_inputs(inputs), lesson)
                    if num_items_in_batch is not None:  # each batch of a step weighs the same
                        answered_tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
                        items = answered_tokens.clamp(min=1) * self.current_gradient_accumulation_steps
                    num_items_in_batch = items
                return super().training_step(model, inputs, num_items_in_batch)

            def get_train_dataloader(self) -> Any:
                if lesson.stored is None:
                    return super().get_train_dataloader()
                collate: Any = self.data_collator
                self.data_collator = _with_stored(collate, lesson.stored)
                try:
                    return super().get_train_dataloader()
                finally:
                    self.data_collator = collate

            def _save(self, *given: Any, **named: Any) -> None:
                with nullcontext() if lesson.teacher is None else lesson.teacher.unsaved():
                    super()._save(*given, **named)

        return Distilling

    return made


def own_answers(trainer: Any, model: Any, inputs: dict[str, Any], lesson: Lesson) -> dict[str, Any]:
    """The batch with what the student answers to its prompts, sampled at temperature 1, in place of the rows' answers.

    As TRL's GKDTrainer samples them. A row's prompt is what comes before its last answer.
    """
    from transformers import GenerationConfig
    from trl.experimental.gkd import GKDTrainer
    from trl.models.utils import unwrap_model_for_generation

    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    prompts = [_prompt(*row) for row in zip(ids, mask, labels, strict=True)]
    asked = {
        "prompts": pad_sequence(prompts, batch_first=True, padding_value=lesson.padding, padding_side="left"),
        "prompt_attention_mask": pad_sequence(
            [torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left"
        ),
    }
    ends = model.generation_config.eos_token_id if hasattr(model, "generation_config") else None
    sampling = {
        "max_new_tokens": lesson.max_new_tokens,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": lesson.padding,
    }
    own = trainer.processing_class.eos_token_id
    settings = GenerationConfig(**sampling, eos_token_id=own if ends is None else ends)
    with unwrap_model_for_generation(model, trainer.accelerator, generation_kwargs=sampling) as unwrapped:
        unwrapped.eval()
        try:
            ids, mask, labels = GKDTrainer.generate_on_policy_outputs(unwrapped, asked, settings)
        finally:
            unwrapped.train()
    there = [row.bool() for row in mask]

    def right(rows: Tensor, padding: int) -> Tensor:
        kept = [row[keep] for row, keep in zip(rows, there, strict=True)]
        return pad_sequence(kept, batch_first=True, padding_value=padding)

    ids, mask, labels = right(ids, lesson.padding), right(mask, 0), right(labels, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, OWN: True}


def _prompt(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    there = mask.bool()
    ids, labels = ids[there], labels[there]
    learned = (labels != IGNORED).nonzero().flatten()
    start = int(learned[-1]) if learned.numel() else len(ids)  # of a row that has no answer, all
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return ids[: max(1, start)]


def _lazily(model: Any, ways: Ways) -> Any:
    return nullcontext() if ways.plain else lazily(model)


def _with_stored(collate: Any, stored: StoredTeacher) -> Callable[[list[dict[str, Any]]], Any]:
    def collated(examples: list[dict[str, Any]]) -> Any:
        top = stored.of(examples)
        return {**collate(examples), STORED[0]: top.logits, STORED[1]: top.words}

    return collated
