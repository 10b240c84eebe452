"""Students of random numbers and their teachers, held to the error of the definition in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import Head, LinearDistillation, Teacher, TopLogits, blocks, linear_distillation
from fastpeft_kernels.loss import rows as walking
from fastpeft_kernels.loss.distillation_reference import distillation_reference, top_logits_reference
from fastpeft_kernels.loss.reference import logits_reference
from fastpeft_kernels.weights import FrozenWeight
from tests.budget import assert_within_budget

from .heads import Case, make_case

TEACHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wider": {"features": 21, "bias": True, "scale": 0.8, "softcap": 4.0},
    "four_bit": {"storage": "four_bit", "rank": 2},
    "top": {"k": 5},
}
WAYS: dict[str, dict[str, float]] = {
    "forward": {},
    "reverse": {"beta": 1.0, "temperature": 2.0},
    "mixed": {"beta": 0.3, "temperature": 0.7},
    "with_labels": {"temperature": 1.5, "divergence_weight": 0.5, "cross_entropy_weight": 0.7},
    "mixed_with_labels": {"beta": 0.6, "cross_entropy_weight": 0.4},
    "labels_alone": {"divergence_weight": 0.0, "cross_entropy_weight": 1.0},
}


@dataclass
class Distillation:
    """A call of `linear_distillation`: a student and its labels, and its teacher."""

    student: Case
    teacher: Teacher | TopLogits
    ways: dict[str, Any]

    def call(self, **more: Any) -> LinearDistillation:
        hidden, labels = self.student.tensors["hidden"], self.student.labels
        return linear_distillation(hidden, self.student.head(), self.teacher, **{"labels": labels, **self.ways, **more})

    def to(self, dtype: torch.dtype) -> Distillation:
        """The same numbers in another dtype."""
        return Distillation(self.student.to(dtype), _cast(self.teacher, dtype), self.ways)

    def definition(self) -> LinearDistillation:
        student = logits_reference(self.student.tensors["hidden"], self.student.head()).flatten(0, -2)
        if isinstance(self.teacher, TopLogits):
            logits, words = self.teacher.logits.flatten(0, -2), self.teacher.words.flatten(0, -2)
            teacher = top_logits_reference(logits, words, student.shape[1])
        else:
            teacher = logits_reference(self.teacher.hidden, self.teacher.head).flatten(0, -2)
        labels = self.student.labels
        found = distillation_reference(student, teacher, labels.flatten(), **self.ways)
        losses, divergence, nll = (x.view(labels.shape) for x in found)
        return LinearDistillation(losses, divergence, nll if "cross_entropy_weight" in self.ways else None)

    def results(self, out: LinearDistillation, given: Tensor) -> dict[str, Tensor]:
        """Values, and gradients where `given` is that of the losses."""
        values = {name: x.detach() for name, x in out._asdict().items() if x is not None}
        return values | self.student.gradients(out, given, None)  # type: ignore[arg-type]


def make(
    *lead: int, teacher: str = "plain", ways: str = "forward", words: int = 24, dtype: torch.dtype, **head: Any
) -> Distillation:
    """See `make_case`, `TEACHERS` and `WAYS`."""
    student = make_case(*lead, words=words, dtype=dtype, **head)
    asked = dict(TEACHERS[teacher])
    if (k := asked.pop("k", None)) is not None:
        order = torch.randn(*lead, words).argsort(-1)[..., : min(k, words)].clone()
        logits = torch.randn(order.shape).to(dtype)
        return Distillation(student, TopLogits(logits, order), dict(WAYS[ways]))
    other = make_case(*lead, words=words, dtype=dtype, **asked)
    tensors = {name: x.detach() for name, x in other.tensors.items()}
    return Distillation(student, Teacher(tensors["hidden"], replace(other, tensors=tensors).head()), dict(WAYS[ways]))


def hold_distillation(case: Distillation) -> None:
    """Fails unless values and all gradients are within the budget and nothing was written into."""
    dtype = case.student.tensors["hidden"].dtype
    copies = {name: x.detach().clone() for name, x in case.student.tensors.items()}
    given = torch.randn(case.student.labels.shape)
    ours = case.results(case.call(reduction="none"), given)
    same, exact = (again.results(again.definition(), given) for again in (case.to(dtype), case.to(torch.float64)))
    what = f"{dtype} {tuple(given.shape)}, {case.student.head().words} words, {type(case.teacher).__name__} {case.ways}"
    for name, value in ours.items():
        assert_within_budget(value, same[name], exact[name], f"{name} of {what}")
    for name, x in case.student.tensors.items():
        assert torch.equal(x, copies[name]), f"{name} was written into"


def shrink_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens and sixteen words at a time: a short sum in more parts would round more than the definition."""
    monkeypatch.setattr(blocks, "_ON_CPU", (4, 16))
    monkeypatch.setattr(blocks, "_WHOLE_ROWS_ON_CPU", (0, 4))
    monkeypatch.setattr(blocks, "_DECODED", {"cpu": 16})
    monkeypatch.setattr(walking, "_PIECE", 50)


def _cast(teacher: Teacher | TopLogits, dtype: torch.dtype) -> Teacher | TopLogits:
    if isinstance(teacher, TopLogits):
        return TopLogits(teacher.logits.to(dtype), teacher.words)
    head = teacher.head

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    weight = head.weight if isinstance(head.weight, FrozenWeight) else head.weight.to(dtype)
    head = Head(weight, cast(head.bias), cast(head.s), cast(head.b), head.scale, head.softcap)
    return Teacher(teacher.hidden.to(dtype), head)
