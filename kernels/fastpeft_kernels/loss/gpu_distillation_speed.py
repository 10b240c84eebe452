"""Times on a CUDA GPU: fused distillation beside its products.

8192 tokens, 4096 features of student and teacher, 128256 words, bf16: the logits of both in fp32 would take 8.4 GB.
Three products of tokens x words x features (a frozen head) are 25.8 TFLOP, 37 ms at 700 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights import DenseWeight
from .distillation import linear_distillation
from .gpu_speed import BF16, FEATURES, TOKENS, WORDS, measured
from .head import Head, Teacher, TopLogits

_DEVICE = torch.device("cuda")
_TOP = 64


class _Problem(NamedTuple):
    """hidden (tokens, features) and weight (words, features) of the student, and the teacher's."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds, TFLOP/s and MiB."""
    for beta in (0.0, 0.5):
        yield f"speed distillation frozen, beta {beta}", partial(_measure, beta, False)
        yield f"speed distillation trained, beta {beta}", partial(_measure, beta, True)
    yield "speed distillation frozen, beta 0.5, with labels", partial(_measure, 0.5, False, cross_entropy_weight=0.5)
    yield "speed distillation frozen, beta 0.0, of the largest logits", _measure_top


def _problem(trained: bool) -> _Problem:
    torch.manual_seed(0)  # so that all losses are the same
    hidden, teacher_hidden = (torch.randn((TOKENS, FEATURES), device=_DEVICE, dtype=BF16) for _ in range(2))
    size = FEATURES**-0.5
    weights = [torch.randn((WORDS, FEATURES), device=_DEVICE, dtype=BF16).mul_(size) for _ in range(2)]
    return _Problem(hidden.requires_grad_(), weights[0].requires_grad_(trained), teacher_hidden, weights[1])


def _measure(beta: float, trained: bool, **ways: float) -> dict[str, Any]:
    hidden, weight, teacher_hidden, teacher_weight = _problem(trained)
    head = Head(weight if trained else DenseWeight(weight))
    teacher, labels = Teacher(teacher_hidden, Head(DenseWeight(teacher_weight))), _labels()

    def loss() -> Tensor:
        return linear_distillation(hidden, head, teacher, labels=labels, beta=beta, **ways).loss  # type: ignore[arg-type]

    return measured(loss, [hidden, weight] if trained else [hidden], 4 if trained else 3)


def _measure_top() -> dict[str, Any]:
    hidden, weight, _, _ = _problem(False)
    words = torch.stack([torch.randperm(WORDS, device=_DEVICE)[:_TOP] for _ in range(64)]).repeat(TOKENS // 64, 1)
    teacher = TopLogits(torch.randn(words.shape, device=_DEVICE, dtype=BF16), words)
    head = Head(DenseWeight(weight))
    return measured(lambda: linear_distillation(hidden, head, teacher).loss, [hidden], 2)


def _labels() -> Tensor:
    return torch.randint(0, WORDS, (TOKENS,), device=_DEVICE)
