"""The same steps without rules, and what differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastpeft.metrics.classification import accuracy
from fastpeft.metrics.findings import Findings, Metric, Section
from fastpeft.metrics.intervals import Interval, over_rows
from fastpeft.strategies.figures import classes, tokens
from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
from fastpeft.training.preparing import Prepared

from .costs import Costs


@dataclass(frozen=True)
class Result:
    """Of one of the two runs.

    Attributes:
        steps: that were trained.
        loss: over the rows of the evaluation, as the trainer has it; None without any.
        scores: row by row, for tasks of which such are known; else None.
        costs: of its steps.
    """

    steps: int
    loss: float | None
    scores: Any
    costs: Costs


def measured(prepared: Prepared, trainer: Any, costs: Costs) -> Result:
    """A trained model, on the rows of the evaluation."""
    loss = None
    if prepared.evaluation is not None:
        loss = float(trainer.evaluate(prepared.evaluation.rows)["eval_loss"])
    return Result(trainer.state.global_step, loss, scores_of(prepared, trainer), costs)


def scores_of(prepared: Prepared, trainer: Any) -> Any:
    """Row by row: losses of a language model, guesses of a classifier; None for other tasks, or no evaluation."""
    task, problem = prepared.config.model.task, prepared.config.data.problem_type
    if prepared.evaluation is None:
        return None
    if task in ("causal-lm", "seq2seq-lm", "masked-lm"):
        return tokens.measure(prepared, trainer)
    if task == "sequence-classification" and problem in (None, "single_label_classification"):
        return classes.measure(prepared, trainer)
    return None


def static_run(prepared: Prepared, arguments: Any, model: Any, build: Callable[..., Any]) -> Result:
    """As many steps of a plain trainer, of which nothing is kept.

    Args:
        arguments: of the run with rules; they stay as they are.
        model: as loaded.
        build: `Strategy.trainer`.
    """
    from transformers.trainer_utils import SaveStrategy

    plain = copy.copy(arguments)
    plain.report_to, plain.load_best_model_at_end = [], False
    plain.save_strategy = SaveStrategy.NO  # evaluations draw random numbers, so they stay
    name, costs = prepared.config.training.optim, Costs()
    optimizer = chosen_optimizer(name, plain, model)
    trainer = build(prepared, model, plain, [costs])
    set_optimizer(trainer, name, optimizer)
    trainer.train()
    return measured(prepared, trainer, costs)


def compared(prepared: Prepared, dynamic: Result, static: Result) -> Findings:
    """Differences on the same rows, and the table of both."""
    metrics = []
    if dynamic.scores is not None and static.scores is not None and prepared.evaluation is not None:
        if prepared.config.model.task == "sequence-classification":
            true = prepared.evaluation.rows["labels"]
            metrics.append(
                _difference("accuracy", accuracy, (true, static.scores), (true, dynamic.scores), "higher", len(true))
            )
        else:
            interval: Interval = dynamic.scores.learned().since(static.scores.learned())
            name = "loss per token: dynamic less static"
            metrics.append(Metric(name, *interval, len(dynamic.scores.learned()), 0.0, "static", "lower"))
    lines = ["| | dynamic | static |", "|---|---|---|"]
    for name, of in ROWS:
        cells = [of(result) for result in (dynamic, static)]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    notes: tuple[str, ...] = ()
    if dynamic.costs.steps < dynamic.steps:
        notes = ("the run was resumed: what its steps took is counted over the last part alone",)
    return Findings(tuple(metrics), notes, (Section("Beside the same steps without rules", "\n".join(lines)),))


def _seconds(result: Result) -> str:
    return "" if result.costs.seconds is None else f"{1000 * result.costs.seconds:.1f}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.3f}"


ROWS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("steps", lambda result: str(result.steps)),
    ("loss on the evaluation", lambda result: "" if result.loss is None else f"{result.loss:.4f}"),
    ("trained values, mean of the steps", lambda result: f"{result.costs.trained:,.0f}"),
    ("gradients, mean, MiB", lambda result: _mib(result.costs.gradient_bytes)),
    ("optimizer state, mean, MiB", lambda result: _mib(result.costs.optimizer_bytes[0])),
    ("optimizer state, largest, MiB", lambda result: _mib(result.costs.optimizer_bytes[1])),
    ("time of a step, median, ms", _seconds),
)


def _difference(
    name: str,
    statistic: Callable[..., float],
    static: tuple[Any, ...],
    dynamic: tuple[Any, ...],
    better: Literal["higher", "lower"],
    rows: int,
) -> Metric:
    """Dynamic less static; the same rows are drawn for both."""
    count = len(static)

    def difference(*columns: Any) -> float:
        return statistic(*columns[count:]) - statistic(*columns[:count])

    interval = over_rows(difference, *static, *dynamic)
    return Metric(f"{name}: dynamic less static", *interval, rows, 0.0, "static", better)
