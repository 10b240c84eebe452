"""How far a student is from its teacher, from what either's call gave: without logits where it can be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from fastpeft.layers.lazy_logits import plain
from fastpeft.layers.without_logits import parts_of
from fastpeft_kernels.common.device import autocast_off
from fastpeft_kernels.loss import Head, Teacher, TopLogits, cross_entropy, kl_divergence, linear_distillation
from fastpeft_kernels.loss.distillation_reference import top_logits_reference
from fastpeft_kernels.loss.divergence_reference import divergence_reference

IGNORED = -100


@dataclass(frozen=True)
class Ways:
    """How divergence and labels make a loss: (1 - labels) temperature^2 divergence + labels cross-entropy.

    Attributes:
        beta, temperature: as of `linear_distillation`.
        labels: share of the labels' own loss.
        plain: by PyTorch's operations, on all logits.
    """

    beta: float = 0.0
    temperature: float = 1.0
    labels: float = 0.0
    plain: bool = False

    @property
    def divergence(self) -> float:
        return (1 - self.labels) * self.temperature**2


def token_loss(student: Tensor, teacher: Tensor | TopLogits, labels: Tensor, ways: Ways) -> Tensor:
    """0-d, the sum over the tokens that have a label.

    Args:
        student: logits (tokens, words), lazy or not; differentiable.
        teacher: logits (tokens, words), lazy or not, or the largest ones of the tokens that have a label, in order:
            (counted, k).
        labels: (tokens,) int64, -100 where nothing is learned.
        ways: how.

    Raises:
        ValueError: the vocabularies differ.
    """
    if not isinstance(teacher, TopLogits) and student.shape[-1] != teacher.shape[-1]:  # rows that pad a vocabulary
        words = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[:, :words], teacher[:, :words]
    counted = labels != IGNORED
    with autocast_off(labels.device):
        if not ways.plain and (found := _without_logits(student, teacher, counted)) is not None:
            hidden, head, from_ = found
            return linear_distillation(
                hidden, head, from_, labels=labels[counted] if isinstance(from_, TopLogits) else labels,
                beta=ways.beta, temperature=ways.temperature, divergence_weight=ways.divergence,
                cross_entropy_weight=ways.labels, reduction="sum",
            ).loss  # fmt: skip
        logits, labels = plain(student)[counted], labels[counted]
        if isinstance(teacher, TopLogits):
            given = top_logits_reference(teacher.logits.to(logits.dtype), teacher.words, logits.shape[-1])
        else:
            given = plain(teacher)[counted]
        if ways.plain:
            divergence = divergence_reference(logits, given, ways.temperature, ways.beta).sum()
            nll = F.cross_entropy(logits.float(), labels, reduction="sum")
        else:
            divergence = kl_divergence(logits, given, ways.temperature, beta=ways.beta, reduction="sum")
            nll = cross_entropy(logits, labels, reduction="sum")
        return ways.divergence * divergence + ways.labels * nll


def _without_logits(
    student: Tensor, teacher: Tensor | TopLogits, counted: Tensor
) -> tuple[Tensor, Head, Teacher | TopLogits] | None:
    """What `linear_distillation` takes; of stored logits' tokens those that count."""
    if isinstance(teacher, TopLogits):
        found = parts_of(student)
        if found is None:
            return None
        hidden, head = found
        return hidden[counted], replace(head, s=None if head.s is None else head.s[counted]), teacher
    parts = parts_of(teacher)
    found = None if parts is None else parts_of(student)
    return None if parts is None or found is None else (*found, Teacher(*parts))
