"""Task-adaptive fine-tuning: one labelled task, its data checked before, its result measured row by row."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback

from fastpeft.config import FastpeftConfig
from fastpeft.data.checks import both_sides, leak_note, leaked, nearly_leaked, notes_on
from fastpeft.data.kinds import kind_of
from fastpeft.data.labels import SINGLE
from fastpeft.errors import UserError
from fastpeft.metrics.findings import Findings, Section
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.training import class_weights, rate_search
from fastpeft.training.checkpoints import callback_state
from fastpeft.training.layer_rates import use_layer_rates
from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
from fastpeft.training.preparing import Prepared, hold_back
from fastpeft.training.rate_search import RateSearch, Trial

from .base import Strategy
from .figures import Figures


@dataclass(frozen=True)
class TaskOptions:
    """`strategy.options` of task-adaptive fine-tuning.

    Attributes:
        class_weights: of the loss, for classes: "balanced", or by label; null: all the same.
        early_stopping: end after so many evaluations without a lower loss, with the adapter of the lowest; null: never.
        layer_rate_decay: each layer learns at so many times the rate of the one above; null: all at the same.
        rate_search: choose training.learning_rate by short runs; null: take it as it is.
        validation_fraction: share of the training rows held back for early_stopping and rate_search to look at.
        generate: how many prompts of the evaluation are answered, before training and after; 0 for none.
        before: measure the model before training too.
        leaks: what is done where rows to evaluate on are trained on.
        near_duplicates: rows count as trained on whose text is at least so much like a training row's; null: the same.
    """

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    early_stopping: int | None = None
    layer_rate_decay: float | None = None
    rate_search: RateSearch | None = None
    validation_fraction: float = 0.1
    generate: int = 50
    before: bool = True
    leaks: Literal["note", "error"] = "note"
    near_duplicates: float | None = None


class TaskAdaptive(Strategy):
    """Supervised fine-tuning, as transformers' Trainer and TRL's SFTTrainer do it."""

    name: ClassVar[str] = "task"
    Options: ClassVar[type] = TaskOptions
    options: TaskOptions

    def __init__(self, config: FastpeftConfig) -> None:
        super().__init__(config)
        self._trials: list[Trial] = []
        self._levels: list[tuple[str, float, int]] = []
        self._figures: Figures | None = None

    def check(self) -> None:
        options = self.options
        if options.early_stopping is not None and options.early_stopping < 1:
            raise UserError(f"strategy.options.early_stopping: expected at least 1, got {options.early_stopping}")
        self.check_shares("layer_rate_decay", "near_duplicates", "validation_fraction")
        self.check_generate()
        if options.rate_search is not None:
            options.rate_search.check()

    def prepare(self, console: Console) -> Prepared:
        prepared = super().prepare(console)
        self._check_task(prepared)
        notes = self._look_at_rows(prepared)
        if self._chooses:
            prepared = hold_back(prepared, self.options.validation_fraction)
            validation = prepared.validation
            assert validation is not None
            notes.append(
                f"{len(validation)} training rows are held back to choose by (strategy.options.validation_fraction): "
                "the evaluation losses during training are over them"
            )
        if self.options.early_stopping is not None:
            prepared = replace(prepared, config=_with_early_stopping(prepared.config))
        self.config = prepared.config
        return replace(prepared, notes=[*prepared.notes, *notes])

    def settle(self, prepared: Prepared, arguments: Any, checkpoint: Path | None, console: Console) -> Any:
        search = self.options.rate_search
        if search is None:
            return arguments
        self._trials = (checkpoint and rate_search.read(checkpoint.parent)) or []
        if not self._trials:
            assert prepared.validation is not None
            short = replace(prepared, validation=prepared.validation.first(search.rows))
            for rate in search.tried:
                console.print(f"trying learning rate {rate:g} for {search.steps} steps", highlight=False)
                make = partial(self._fresh_trainer, short)
                self._trials.append(rate_search.try_rate(make, arguments, rate, search.steps))
        chosen = copy.copy(arguments)
        chosen.learning_rate = rate_search.best(self._trials).rate
        return chosen

    def callbacks(self, prepared: Prepared) -> list[TrainerCallback]:
        patience = self.options.early_stopping
        return [] if patience is None else [EarlyStoppingCallback(patience)]

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        trainer = super().trainer(prepared, model, arguments, callbacks)
        if (wanted := self.options.class_weights) is not None:
            labels, classes = prepared.config.data.labels or [], prepared.rows.rows["labels"]
            weights = class_weights.weights_of(wanted, labels, classes)
            trainer.compute_loss_func = class_weights.weighted_loss(weights, arguments.label_smoothing_factor)
        if (decay := self.options.layer_rate_decay) is not None:
            self._levels = use_layer_rates(trainer, prepared.config.training.optim, decay)
        return trainer

    def is_over(self, checkpoint: Path) -> bool:
        patience = self.options.early_stopping
        if patience is None:
            return False
        waited = callback_state(checkpoint, EarlyStoppingCallback.__name__).get("early_stopping_patience_counter", 0)
        return isinstance(waited, int) and waited >= patience

    def before(self, prepared: Prepared, trainer: Any) -> None:
        if self._trials and trainer.is_world_process_zero():
            rate_search.write(self._trials, Path(trainer.args.output_dir))
        if prepared.evaluation is not None:
            self._figures = Figures(prepared, self.options.generate)
            if self.options.before:
                self._figures.measure_before(prepared, trainer)

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        found = Findings() if self._figures is None else self._figures.findings(prepared, trainer)
        sections, notes = list(found.sections), list(found.notes)
        if self._trials:
            sections.append(Section("Learning-rate search", rate_search.table(self._trials)))
            ends = {self._trials[0].rate: "lowest", self._trials[-1].rate: "highest"}
            if end := ends.get(rate_search.best(self._trials).rate):
                notes.append(f"the rate that was taken is the {end} that was tried: a better one may lie beyond it")
        if self._levels:
            lines = ["| | peak learning rate | trained values |", "|---|---|---|"]
            lines += [f"| {name} | {rate:.3g} | {count:,} |" for name, rate, count in self._levels]
            sections.append(Section("Learning rates by layer", "\n".join(lines)))
        return replace(found, sections=tuple(sections), notes=tuple(notes))

    def _fresh_trainer(self, prepared: Prepared, arguments: Any) -> Any:
        device, name = pick_device(), prepared.config.training.optim
        model = self.load(prepared, device, pick_dtype(prepared.config.model.dtype, device))
        optimizer = chosen_optimizer(name, arguments, model)
        trainer = self.trainer(prepared, model, arguments, [])
        set_optimizer(trainer, name, optimizer)
        return trainer

    @property
    def _chooses(self) -> bool:
        return self.options.early_stopping is not None or self.options.rate_search is not None

    def _check_task(self, prepared: Prepared) -> None:
        wanted, task = self.options.class_weights, prepared.config.model.task
        if wanted is None:
            return
        if task != "sequence-classification":
            raise UserError(f"strategy.options.class_weights: expected null for task {task}, got {wanted}")
        if (problem := prepared.config.data.problem_type) != SINGLE:
            expected = f"expected null for data.problem_type {problem}"
            raise UserError(f"strategy.options.class_weights: {expected}, got {wanted}")
        if wanted != "balanced":
            class_weights.check_weights(wanted, prepared.config.data.labels or [])

    def _look_at_rows(self, prepared: Prepared) -> list[str]:
        """Notes on the data. Raises UserError for rows to evaluate on that are trained on, where that is asked for."""
        task = prepared.config.model.task
        kind = kind_of(prepared.rows.raw.column_names, task)
        training, evaluation = both_sides(prepared.rows, prepared.evaluation, kind)
        notes = notes_on(training, evaluation, labelled=prepared.config.data.problem_type == SINGLE)
        threshold = self.options.near_duplicates
        found = leaked(training, evaluation) if threshold is None else nearly_leaked(training, evaluation, threshold)
        if not found:
            return notes
        if self.options.leaks == "error":
            raise UserError(f"strategy.options.leaks: {leak_note(found, len(evaluation))}")
        return [*notes, leak_note(found, len(evaluation))]


def _with_early_stopping(config: FastpeftConfig) -> FastpeftConfig:
    """Checkpoints where it is evaluated, of which the best is loaded in the end."""
    training = config.training
    own = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,  # a resumed run has waited as long as one without a break
    }
    for name, value in own.items():
        if training.extra.get(name, value) != value:
            raise UserError(
                f"training.extra.{name}: expected {value} with strategy.options.early_stopping, "
                f"got {training.extra[name]}"
            )
    steps = training.eval_steps if training.save_steps is None else training.save_steps
    evaluated = steps if training.eval_steps is None else training.eval_steps
    training = replace(training, extra=training.extra | own, save_steps=steps, eval_steps=evaluated)
    return replace(config, training=training)
