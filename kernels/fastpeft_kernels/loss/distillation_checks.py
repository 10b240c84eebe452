"""Checks of the arguments of `linear_distillation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.tracing import as_op
from ..common.validation import check_device, check_floating, check_instance
from .head import Teacher, TopLogits
from .validation import check_beta, check_head, check_number, check_temperature


def check_teacher(teacher: Any, hidden: Tensor, words: int, beta: float) -> None:
    """Raise TypeError or ValueError unless it has a distribution over `words` for each hidden state."""
    check_instance("teacher", teacher, Teacher, TopLogits)
    if isinstance(teacher, TopLogits):
        _check_top(teacher, hidden, words)
        if beta == 1:
            raise ValueError(
                "beta: expected beta < 1 with a teacher's largest logits, which say nothing of other words"
            )
        return
    _check_constant("teacher.hidden", teacher.hidden, hidden)
    check_head(teacher.head, teacher.hidden, "teacher.head", "teacher.hidden")
    if teacher.head.words != words:
        raise ValueError(
            f"teacher.head.weight: expected the student's {words} words, got {teacher.head.words}: a divergence is "
            "between distributions over the same words; rows that only pad a vocabulary can be cut off"
        )


def check_ways(beta: Any, temperature: Any, divergence_weight: Any, cross_entropy_weight: Any, labels: Any) -> None:
    """Raise TypeError or ValueError unless they are as `linear_distillation` says."""
    check_beta(beta)
    check_temperature(temperature)
    for name, value in (("divergence_weight", divergence_weight), ("cross_entropy_weight", cross_entropy_weight)):
        check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    if cross_entropy_weight and labels is None:
        raise ValueError(f"labels: expected labels with cross_entropy_weight {cross_entropy_weight}, got None")


def _check_top(top: TopLogits, hidden: Tensor, words: int) -> None:
    _check_constant("teacher.logits", top.logits, hidden)
    check_instance("teacher.words", top.words, Tensor)
    if top.words.dtype != torch.int64:
        raise TypeError(f"teacher.words: expected torch.int64, got {top.words.dtype}")
    check_device("teacher.words", top.words.device, hidden.device, "hidden")
    shape = tuple(top.logits.shape)
    if tuple(top.words.shape) != shape:
        raise ValueError(f"teacher.words: expected the shape of teacher.logits, {shape}, got {tuple(top.words.shape)}")
    if not 1 <= shape[-1] <= words:
        raise ValueError(f"teacher.logits: expected between 1 and {words} words a token, got {shape[-1]}")
    if top.words.device.type != "cpu" or as_op() or not top.words.numel():
        return
    low, high = int(top.words.min()), int(top.words.max())
    if low < 0 or high >= words:
        got = low if low < 0 else high
        raise ValueError(f"teacher.words: expected 0 <= word < {words}, the student's vocabulary, got {got}")
    ordered = top.words.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError("teacher.words: expected distinct words for each token, got one twice")


def _check_constant(name: str, x: Any, hidden: Tensor) -> None:
    check_floating(name, x)
    check_device(name, x.device, hidden.device, "hidden")
    if x.dim() < 1 or x.shape[:-1] != hidden.shape[:-1]:
        lead = (*hidden.shape[:-1], "*")
        raise ValueError(f"{name}: expected shape {lead}, as hidden but for the last size, got {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does: detach it")
