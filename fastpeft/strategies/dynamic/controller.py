"""The callback that asks rules at each step, and keeps what they know in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpeft.training.checkpoints import callback_state
from fastpeft.training.folder import DECISIONS

from .actions import Action, Run
from .decisions import from_state, write
from .trained import Trained


class Controller(TrainerCallback, ExportableState):
    """Rules act once before the first step and after each but the last; a checkpoint has their state after that.

    Attributes:
        run: what they act on; None before `begin`.
        trained: numbers of the trained layers, by the step that they were trained from.
    """

    def __init__(self, rules: Sequence[Action], saved: dict[str, Any] | None) -> None:
        """`saved` is what `saved_in` found in the checkpoint to go on from; None to begin."""
        self._rules, self._saved = rules, saved
        self.run: Run | None = None
        self.trained: dict[int, list[int]] = {}
        self._training = False
        for rule, state in zip(rules, (saved or {}).get("rules", ()), strict=saved is not None):
            rule.restore(state)

    def begin(self, trainer: Any) -> None:
        """With the trainer built. Raises UserError for rules that do not fit the model."""
        saved = self._saved or {}
        decisions = from_state(saved.get("decisions", ()))
        self.run = Run(trainer, Trained(trainer.model), decisions=decisions, over=saved.get("over", False))
        self.trained = {int(step): numbers for step, numbers in saved.get("trained", {}).items()}
        self.run.write = self._write
        for rule in self._rules:
            rule.begin(self.run)

    def state(self) -> dict[str, Any]:
        run = self.run
        attributes = {
            "rules": [rule.state() for rule in self._rules],
            "decisions": [] if run is None else [asdict(decision) for decision in run.decisions],
            "over": run is not None and run.over,
            "trained": {str(step): numbers for step, numbers in self.trained.items()},
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        run = self.run
        assert run is not None
        run.step, self._training = state.global_step, True
        self._write()
        if run.step:
            for rule in self._rules:
                rule.resume(run)
        else:
            self._act()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.run is not None
        for rule in self._rules:
            rule.begin_step(self.run)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.run is not None
        for rule in self._rules:
            rule.measure(self.run)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        run = self.run
        assert run is not None
        run.step = state.global_step
        run.loss, run.trainer.step_loss = float(run.trainer.step_loss), None
        if run.step < state.max_steps:
            self._act()
        control.should_training_stop = control.should_training_stop or run.over

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self._training and self.run is not None and metrics and "eval_loss" in metrics:
            for rule in self._rules:
                rule.evaluated(self.run, float(metrics["eval_loss"]))
            control.should_training_stop = control.should_training_stop or self.run.over

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = False

    def _act(self) -> None:
        run = self.run
        assert run is not None
        for rule in self._rules:
            rule.act(run)
        active = sorted(run.trained.active)
        if not self.trained or self.trained[max(self.trained)] != active:
            self.trained[run.step] = active

    def _write(self) -> None:
        run = self.run
        assert run is not None
        if run.trainer.is_world_process_zero():
            write(run.decisions, run.folder / DECISIONS)


def saved_in(checkpoint: Path | None) -> dict[str, Any] | None:
    """What a controller left in a checkpoint; None without a checkpoint."""
    return None if checkpoint is None else callback_state(checkpoint, Controller.__name__)
