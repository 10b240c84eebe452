"""A language model's figures by token: the loss, and how many are right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastpeft.metrics.findings import Findings, Metric
from fastpeft.metrics.intervals import over_rows
from fastpeft.training.evaluating import TokenScores, token_scores
from fastpeft.training.preparing import Prepared

from .change import BEFORE, change


def measure(prepared: Prepared, trainer: Any) -> TokenScores:
    """Of each row of the evaluation."""
    assert prepared.evaluation is not None
    return token_scores(prepared, trainer, prepared.evaluation)


def findings(prepared: Prepared, scores: TokenScores, before: TokenScores | None) -> Findings:
    """Per token of what is learned: loss and perplexity, for masked tokens the share that is right."""
    masked = prepared.config.model.task == "masked-lm"
    kind = "masked token" if masked else "token"
    metrics = [_metric(f"loss per {kind}", _loss, scores, before)]
    if before is not None:
        columns = ((before.loss, before.tokens), (scores.loss, scores.tokens))
        metrics.append(change(metrics[0].name, ratio, *columns, "lower"))
    if masked:
        metrics.append(_metric("accuracy of masked tokens", _right, scores, before, better="higher"))
    else:
        metrics.append(_metric("perplexity", _perplexity, scores, before))
    return Findings(tuple(metrics))


def _metric(
    name: str, statistic: Any, scores: TokenScores, before: TokenScores | None, better: Any = "lower"
) -> Metric:
    counted = [row for row, count in enumerate(scores.tokens) if count]
    columns = [np.asarray(column)[counted] for column in scores]
    baseline = None if before is None else statistic(*map(np.asarray, before))
    against = "" if before is None else BEFORE
    return Metric(name, *over_rows(statistic, *columns), len(counted), baseline, against, better)


def ratio(sums: Any, counts: Any) -> float:
    """Over all tokens, so that long rows weigh more."""
    return float(np.sum(sums) / max(1, np.sum(counts)))


def _loss(loss: Any, tokens: Any, right: Any) -> float:
    return ratio(loss, tokens)


def _right(loss: Any, tokens: Any, right: Any) -> float:
    return ratio(right, tokens)


def _perplexity(loss: Any, tokens: Any, right: Any) -> float:
    return math.exp(min(700.0, ratio(loss, tokens)))
