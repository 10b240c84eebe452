"""What a distillation's report says: teacher and student side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from fastpeft.data.encoded import Encoded
from fastpeft.layers.lazy_logits import plain
from fastpeft.metrics.findings import Metric, Section
from fastpeft.metrics.intervals import over_rows
from fastpeft.structured import build
from fastpeft.training.evaluating import batches, evaluating
from fastpeft.training.preparing import Prepared
from fastpeft_kernels.loss import kl_divergence

from .losses import IGNORED

FORWARDS = 5


@dataclass(frozen=True)
class Side:
    """One model, as it answers the evaluation.

    Attributes:
        parameters, mib: of all its weights as they are stored, an adapter's included.
        seconds: of a forward of the first batch, without gradients, the median of five; zero where nothing is
            evaluated.
        tokens: in that batch, padding included.
        quality: the figures of the task by name.
    """

    parameters: int
    mib: float
    seconds: float
    tokens: int
    quality: dict[str, float]


def read_side(text: str) -> Side | None:
    """From JSON of a `Side`'s attributes; None for anything else."""
    try:
        return build(Side, json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None


def size_of(model: Any, has: Callable[[str], bool]) -> tuple[int, float]:
    """(values, MiB) of the parameters whose names are wanted, each once; values that are packed count as they are."""
    values, size = 0, 0
    for name, parameter in model.named_parameters():
        if not has(name):
            continue
        state = getattr(parameter, "quant_state", None)
        values += parameter.numel() if state is None else int(np.prod(state.shape))
        size += parameter.nbytes
    return values, size / 2**20


def timed(prepared: Prepared, trainer: Any, model: Any) -> tuple[float, int]:
    """(seconds of a forward, tokens in it) on the evaluation's first batch."""
    assert prepared.evaluation is not None
    first = next(iter(batches(prepared, trainer, prepared.evaluation)))
    first.pop("labels", None)
    spans = []
    with evaluating(prepared, model) as forward:
        forward(first)
        for _ in range(FORWARDS):
            _wait()
            begun = time.perf_counter()
            forward(first)
            _wait()
            spans.append(time.perf_counter() - begun)
    return median(spans), int(first["input_ids"].numel())


def apart(
    prepared: Prepared,
    trainer: Any,
    teacher: Callable[[], AbstractContextManager[Any]],
    encoded: Encoded,
) -> tuple[Any, Any]:
    """Of each row: KL(teacher || student) in nats summed over what is learned, and how many tokens that is."""
    shift = int(prepared.config.model.task == "causal-lm")
    sums, counts = list[float](), list[int]()
    for batch in batches(prepared, trainer, encoded):
        labels = batch.pop("labels")
        with teacher() as model, evaluating(prepared, model) as forward:
            theirs = plain(forward(batch).logits)
        with evaluating(prepared, trainer.model) as forward:
            ours = plain(forward(batch).logits)
        words = min(ours.shape[-1], theirs.shape[-1])
        for student, given, wanted in zip(ours, theirs, labels, strict=True):
            student, given, wanted = (x if wanted.dim() else x[None] for x in (student, given, wanted))
            learned = (wanted[shift:] != IGNORED).to(student.device)
            rows = [x[: len(learned)][learned][:, :words] for x in (student, given)]
            sums.append(float(kl_divergence(*rows, reduction="sum")) if int(learned.sum()) else 0.0)
            counts.append(int(learned.sum()))
    return np.asarray(sums), np.asarray(counts)


def divergence_metric(before: tuple[Any, Any], after: tuple[Any, Any], unit: str) -> Metric:
    """How far the student is from its teacher on the evaluation, beside before training."""

    def mean(sums: Any, counts: Any) -> float:
        return float(sums.sum() / max(1, counts.sum()))

    rows = int((after[1] > 0).sum())
    name = f"divergence from the teacher, nats a {unit}"
    return Metric(name, *over_rows(mean, *after), rows, mean(*before), "before training", "lower")


def section(teacher: Side, before: Side, after: Side, teacher_is: str, student_is: str) -> Section:
    """Size, speed and quality of both."""
    lines = ["| | teacher | student before | student after |", "|---|---|---|---|"]
    sides = (teacher, before, after)
    lines.append(f"| parameters | {' | '.join(f'{side.parameters:,}' for side in sides)} |")
    lines.append(f"| their bytes, MiB | {' | '.join(f'{side.mib:,.1f}' for side in sides)} |")
    if after.seconds:
        cells = " | ".join(f"{side.tokens / side.seconds:,.0f}" if side.seconds else "" for side in sides)
        lines.append(f"| forward, tokens/s ({after.tokens:,} tokens, padding included) | {cells} |")
    for name in after.quality:
        cells = " | ".join(f"{side.quality[name]:.4g}" if name in side.quality else "" for side in sides)
        lines.append(f"| {name} | {cells} |")
    lines += ["", f"The teacher is {teacher_is}, the student {student_is}."]
    if after.seconds:
        lines.append(f"Speed is the median of {FORWARDS} forwards of one evaluation batch, here, with nothing merged.")
    return Section("Teacher and student", "\n".join(lines))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
