"""When a checkpoint is saved: after the evaluation that belongs to its step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy


class SaveAfterEvaluation(TrainerCallback):
    """Puts off a checkpoint of the step before an epoch's evaluation until that is done.

    A run resumed from one saved before would do without the evaluation and the random numbers that it draws.
    """

    def __init__(self) -> None:
        self._waits = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save and args.eval_strategy == IntervalStrategy.EPOCH:
            self._waits = at_epoch_end(state) or state.global_step >= state.max_steps
            control.should_save = not self._waits

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or self._waits
        self._waits = False


def at_epoch_end(state: Any) -> bool:
    """Whether the step was the last of its epoch."""
    return bool(abs(state.epoch - round(state.epoch)) < 1e-6)
