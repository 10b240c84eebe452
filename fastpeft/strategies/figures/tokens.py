"""A language model's figures by token: the loss, and how many are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastpeft.metrics.findings import Findings, Metric
from fastpeft.metrics.intervals import Interval
from fastpeft.metrics.language import Losses
from fastpeft.training.evaluating import token_losses
from fastpeft.training.preparing import Prepared

from .change import BEFORE


def measure(prepared: Prepared, trainer: Any) -> Losses:
    """Of each row of the evaluation."""
    assert prepared.evaluation is not None
    return token_losses(prepared, trainer, prepared.evaluation)


def findings(prepared: Prepared, losses: Losses, before: Losses | None) -> Findings:
    """Per token of what is learned: loss and perplexity, for masked tokens the share that is right."""
    masked = prepared.config.model.task == "masked-lm"
    losses, before = losses.learned(), None if before is None else before.learned()
    name = f"loss per {'masked token' if masked else 'token'}"
    metrics = [_metric(name, Losses.loss, losses, before)]
    if before is not None:
        interval = losses.since(before)
        metrics.append(Metric(f"{name}: change by training", *interval, len(losses), 0.0, "no change", "lower"))
    if masked:
        metrics.append(_metric("accuracy of masked tokens", Losses.accuracy, losses, before, better="higher"))
    else:
        metrics.append(_metric("perplexity", Losses.perplexity, losses, before))
    return Findings(tuple(metrics))


def _metric(
    name: str,
    figure: Callable[[Losses], Interval],
    losses: Losses,
    before: Losses | None,
    better: Literal["higher", "lower"] = "lower",
) -> Metric:
    baseline, against = (None, "") if before is None else (figure(before).value, BEFORE)
    return Metric(name, *figure(losses), len(losses), baseline, against, better)
