"""Dynamic fine-tuning: rules that act on measured signals, beside the same steps without them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from transformers import TrainerCallback

from fastpeft.config import FastpeftConfig, LoraSection
from fastpeft.data.checks import leak_notes
from fastpeft.data.labels import SINGLE
from fastpeft.errors import UserError
from fastpeft.metrics.findings import Findings, Section
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.strategies.base import Strategy
from fastpeft.strategies.figures import Figures
from fastpeft.training.folder import COSTS, DECISIONS_PLOT
from fastpeft.training.optimizers import chosen_optimizer
from fastpeft.training.preparing import Prepared, hold_back

from . import beside
from .actions import rules_of
from .actions.dylora import Dylora
from .by_rank import by_rank
from .controller import Controller, saved_in
from .costs import Costs
from .decisions import plot, table
from .losses import TASKS
from .trained import named
from .trainer import steer


@dataclass(frozen=True)
class DynamicOptions:
    """`strategy.options` of dynamic fine-tuning.

    Attributes:
        rules: mappings of an `action` and its options; they act in this order.
        static: train as many steps without rules too, and report both.
        validation_fraction: share of the training rows held back, where a rule looks at "validation".
        generate: how many prompts of the evaluation are answered, before training and after; 0 for none.
        before: measure the model before training too.
    """

    rules: list[dict[str, Any]] = field(default_factory=list)
    static: bool = False
    validation_fraction: float = 0.1
    generate: int = 0
    before: bool = True


class Dynamic(Strategy):
    """The definition is ours: what is trained, how strongly or on which data changes with what is measured."""

    name: ClassVar[str] = "dynamic"
    Options: ClassVar[type] = DynamicOptions
    options: DynamicOptions

    def __init__(self, config: FastpeftConfig) -> None:
        super().__init__(config)
        self._rules = rules_of(self.options.rules, config)
        self._saved: dict[str, Any] | None = None
        self._controller: Controller | None = None
        self._costs = Costs()
        self._figures: Figures | None = None

    def check(self) -> None:
        if not self.options.rules:
            raise UserError("strategy.options.rules: expected at least one rule, got none")
        self.check_shares("validation_fraction")
        self.check_generate()
        pruning = next((rule for rule in self._rules if rule.name == "ranks"), None)
        if pruning is not None and self.config.training.extra.get("load_best_model_at_end"):
            raise UserError(
                f"training.extra.load_best_model_at_end: expected false with {pruning.key}, ranks, got true: the best "
                "adapter may be larger than the last"
            )
        smoothing = self.config.training.extra.get("label_smoothing_factor")
        if smoothing and any(rule.weighs for rule in self._rules):
            raise UserError(
                f"training.extra.label_smoothing_factor: expected 0 with rules that weight tokens, got {smoothing}"
            )

    def prepare(self, console: Console) -> Prepared:
        prepared = super().prepare(console)
        data, task = prepared.config.data, prepared.config.model.task
        leaks = leak_notes(prepared.rows, prepared.evaluation, task)
        prepared = replace(prepared, notes=[*prepared.notes, *leaks])
        weighing = next((rule for rule in self._rules if rule.weighs), None)
        if weighing is not None and (task not in TASKS or data.problem_type not in (None, SINGLE)):
            kind = task if task not in TASKS else f"data.problem_type {data.problem_type}"
            raise UserError(f"{weighing.key}.action: expected a loss over words or classes, got {kind}")
        if any(rule.looks_at_validation for rule in self._rules):
            prepared = hold_back(prepared, self.options.validation_fraction)
            note = (
                f"{len(prepared.watched or ())} training rows are held back for rules to look at "
                "(strategy.options.validation_fraction): the evaluation losses during training are over them"
            )
            prepared = replace(prepared, notes=[*prepared.notes, note])
        return prepared

    def settle(self, prepared: Prepared, arguments: Any, checkpoint: Path | None, console: Console) -> Any:
        if arguments.world_size > 1:
            raise UserError(f"strategy.name: dynamic expected one process, got {arguments.world_size}")
        self._saved = saved_in(checkpoint)
        return arguments

    def change(self, base: Any, section: LoraSection) -> LoraSection:
        states: list[dict[str, Any]] = (self._saved or {}).get("rules", [])
        ranks = next((state["ranks"] for state in states if "ranks" in state), None)
        if ranks is None:
            return section
        patterns = {
            "rank_pattern": {path: rank for path, (rank, _) in ranks.items()},
            "alpha_pattern": {path: alpha for path, (_, alpha) in ranks.items()},
        }
        return replace(section, extra=section.extra | patterns)

    def callbacks(self, prepared: Prepared) -> list[TrainerCallback]:
        self._controller = Controller(self._rules, self._saved)
        return [self._costs, self._controller]

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        self._check_optimizer(prepared, model, arguments)
        trainer = super().trainer(prepared, model, arguments, callbacks)
        steer(trainer, prepared.config.model.task, self._rules)
        assert self._controller is not None
        self._controller.begin(trainer)
        return trainer

    def is_over(self, checkpoint: Path) -> bool:
        return bool((saved_in(checkpoint) or {}).get("over"))

    def before(self, prepared: Prepared, trainer: Any) -> None:
        if prepared.evaluation is not None:
            self._figures = Figures(prepared, self.options.generate)
            if self.options.before:
                self._figures.measure_before(prepared, trainer)

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        found = Findings() if self._figures is None else self._figures.findings(prepared, trainer)
        costs = {"dynamic": self._costs}
        if self.options.static:
            dynamic, static = self._dynamic_and_static(prepared, trainer)
            costs["static"] = static.costs
            found = found + beside.compared(prepared, dynamic, static)
        for rule in self._rules:
            if isinstance(rule, Dylora):
                found = found + by_rank(prepared, trainer, rule.measured)
        if trainer.is_world_process_zero():
            records = {name: each.record() for name, each in costs.items()}
            (Path(trainer.args.output_dir) / COSTS).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        return found + self._decided(trainer)

    def _check_optimizer(self, prepared: Prepared, model: Any, arguments: Any) -> None:
        """Raises UserError for an optimizer whose state is not that of single parameters, where some come and go."""
        acting = next((rule for rule in self._rules if rule.changes_parameters), None)
        if acting is None:
            return
        optimizer = prepared.config.training.optim
        kind, settings = chosen_optimizer(optimizer, arguments, model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & settings.keys():
            raise UserError(
                f"{acting.key}.action: expected a training.optim of groups of parameters with {acting.name}, "
                f"got {optimizer}"
            )

    def _dynamic_and_static(self, prepared: Prepared, trainer: Any) -> tuple[beside.Result, beside.Result]:
        device = pick_device()
        dynamic = beside.measured(prepared, trainer, self._costs)
        self._saved = None  # all ranks again
        model = self.load(prepared, device, pick_dtype(prepared.config.model.dtype, device))
        return dynamic, beside.static_run(prepared, trainer.args, model, super().trainer)

    def _decided(self, trainer: Any) -> Findings:
        controller = self._controller
        assert controller is not None and controller.run is not None
        run = controller.run
        text = table(run.decisions) if run.decisions else "None was taken."
        if trainer.is_world_process_zero():
            losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
            plot(controller.trained, sorted(run.trained.layers), losses, run.folder / DECISIONS_PLOT)
            text += f"\n\n![trained layers]({DECISIONS_PLOT})"
        layers = f"Layers trained in the end: {named(run.trained.active)} of {named(run.trained.layers)}."
        return Findings((), (), (Section("Decisions", f"{layers}\n\n{text}"),))
