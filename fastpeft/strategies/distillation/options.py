"""`strategy.options` of distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastpeft.errors import UserError

BASE = "base"
"""The teacher that is the student's own base, its adapter off."""


@dataclass(frozen=True)
class DistillationOptions:
    """What is learned of whom.

    Attributes:
        teacher: a model or an adapter, folder or hub ID; "base": the student's base without its adapter; null with
            student_layers: the model that they are taken of.
        teacher_quantization: storage of the teacher's weights; null: as its adapter was trained on, else 16 or 32 bits.
        teacher_streamed: the teacher's layers stay in host memory and are copied ahead of each use.
        student_layers: the student is model.name with every n-th layer alone, or with these, counted from 0.
        student_of: the model whose layers those are; null: model.name.
        beta: 0 for the forward KL divergence, 1 for the reverse, the Jensen-Shannon divergence between.
        temperature: of both distributions.
        labels_weight: share of the labels' own loss; the rest is the divergence times temperature^2.
        hidden_weight: of the mean squared error between hidden states of layers.
        attention_weight: of that between the attentions of heads.
        layer_map: the teacher's layer that each of the student's is to match, counted from 0; null: evenly spread.
        top_k: store the teacher's k largest logits of each token before training; 0: ask the teacher in every step.
        stored: their file; null: teacher.safetensors in training.output_dir.
        on_policy: share of the steps that learn from what the student itself answers to the rows' prompts.
        max_new_tokens: of such answers.
        generate: how many prompts of the evaluation are answered, before training and after; 0 for none.
    """

    teacher: str | None = None
    teacher_quantization: Literal["none", "nf4", "fp4", "int8"] | None = None
    teacher_streamed: bool = False
    student_layers: int | list[int] | None = None
    student_of: str | None = None
    beta: float = 0.0
    temperature: float = 1.0
    labels_weight: float = 0.5
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    layer_map: list[int] | None = None
    top_k: int = 0
    stored: str | None = None
    on_policy: float = 0.0
    max_new_tokens: int = 128
    generate: int = 0

    @property
    def matches(self) -> bool:
        """Whether inner states are compared, which logits that were stored have none of."""
        return bool(self.hidden_weight or self.attention_weight)

    def check(self) -> None:
        """Raise UserError for values out of range, and for those that exclude each other."""
        for name in ("beta", "labels_weight", "on_policy"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UserError(f"strategy.options.{name}: expected 0 to 1, got {value}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"strategy.options.temperature: expected more than 0, got {self.temperature}")
        for name in ("hidden_weight", "attention_weight"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"strategy.options.{name}: expected at least 0, got {value}")
        for name, least in (("top_k", 0), ("max_new_tokens", 1), ("generate", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"strategy.options.{name}: expected at least {least}, got {value}")
        if self.labels_weight == 1 and not self.matches:
            raise UserError("strategy.options.labels_weight: expected less than 1, got 1, which leaves the teacher out")
        if self.layer_map is not None and not self.matches:
            raise UserError(
                "strategy.options.layer_map: expected null without hidden_weight or attention_weight, "
                f"got {self.layer_map}"
            )
        self._check_teacher()
        if self.top_k:
            self._check_stored()
        elif self.stored is not None:
            raise UserError(f"strategy.options.stored: expected null with top_k 0, got {self.stored!r}")

    def _check_teacher(self) -> None:
        layers = self.student_layers
        if layers is None and self.teacher is None:
            raise UserError(
                f"strategy.options.teacher: expected a model, an adapter or {BASE!r}, got null without student_layers"
            )
        if layers is None and self.student_of is not None:
            raise UserError(
                f"strategy.options.student_of: expected null without student_layers, got {self.student_of!r}"
            )
        if self.teacher == BASE and layers is not None:
            raise UserError(
                f"strategy.options.teacher: expected null with student_layers, whose base lacks layers, got {BASE!r}"
            )
        if isinstance(layers, int) and layers < 2:
            raise UserError(f"strategy.options.student_layers: expected at least 2, every second layer, got {layers}")
        if isinstance(layers, list) and (not layers or sorted(set(layers)) != layers or layers[0] < 0):
            raise UserError(
                f"strategy.options.student_layers: expected numbers from 0 on in ascending order, got {layers}"
            )
        if self.teacher == BASE and (self.teacher_quantization is not None or self.teacher_streamed):
            name = "teacher_streamed" if self.teacher_streamed else "teacher_quantization"
            raise UserError(f"strategy.options.{name}: expected none with teacher {BASE!r}, which is the student's own")

    def _check_stored(self) -> None:
        if self.beta == 1:
            raise UserError(
                "strategy.options.beta: expected less than 1 with top_k, because the reverse divergence from a teacher "
                "of k words is infinite, got 1"
            )
        for name, why in (
            ("hidden_weight", "logits have no hidden states"),
            ("attention_weight", "logits have no attentions"),
            ("on_policy", "what the student will answer is not known beforehand"),
        ):
            if value := getattr(self, name):
                raise UserError(f"strategy.options.{name}: expected 0 with top_k, because {why}, got {value}")
