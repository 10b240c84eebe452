"""What is seen of a training while it runs: its progress, its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from types import TracebackType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from fastpeft.errors import RunFailed
from fastpeft.progress import Listener, stage


class Progress(TrainerCallback):
    """A trainer's callback and a context: bar or lines, by the console."""

    def __init__(self, console: Console) -> None:
        self._console, self._stack = console, ExitStack()
        self._listen: Listener | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and not self._console.quiet:
            self._listen = self._stack.enter_context(stage(self._console, "training", state.max_steps))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._show(state, float(logs["loss"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show(state)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last steps' loss, whatever logging_steps is

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if self._listen and metrics and "eval_loss" in metrics:
            self._listen({"event": "status", "text": f"evaluation loss {metrics['eval_loss']:.3f}"})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stack.close()
        self._listen = None

    def _show(self, state: Any, loss: float | None = None) -> None:
        if self._listen:
            event = {"event": "step", "step": state.global_step, "steps": state.max_steps, "loss": loss}
            self._listen(event)


class StopAtNaN(TrainerCallback):
    """Ends a training whose loss, or what it trains, is no number any more; no checkpoint is saved of it.

    It must come after the callbacks that ask for checkpoints.

    Attributes:
        found: what is no number, in words; None if all is well.
    """

    def __init__(self) -> None:
        self.found: str | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and not math.isfinite(float(logs.get("loss", 0.0))):
            self._end(control, f"the loss of step {state.global_step}")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if control.should_save and not all_finite(model):
            self._end(control, f"what was trained by step {state.global_step}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.on_step_end(args, state, control, model)
        if self.found is not None:
            control.should_save = control.should_evaluate = False

    def check(self, model: Any, why: Callable[[], str] | None = None) -> None:
        """Raise RunFailed unless all was numbers to the end. `why` is asked where that comes from, and what to do."""
        if self.found is not None or not all_finite(model):
            advice = "try a lower training.learning_rate, or model.dtype float32" if why is None else why()
            raise RunFailed(f"{self.found or 'what was trained'} is no number, so no adapter was saved; {advice}")

    def _end(self, control: Any, found: str) -> None:
        self.found = self.found or found
        control.should_training_stop, control.should_save, control.should_evaluate = True, False, False


def all_finite(model: Any) -> bool:
    """Whether all that is trained is a number."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters() if parameter.requires_grad)


class Speed(TrainerCallback):
    """Tokens a second of each step, without evaluation and saving.

    Tokens are those of the model's main input, without padding. The first step is left out: memory is fetched from the
    system then, and kernels are chosen.
    """

    def __init__(self) -> None:
        self._start, self._tokens, self._rates = 0.0, 0, [0.0][:0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tokens, self._start = state.num_input_tokens_seen, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._rates.append((state.num_input_tokens_seen - self._tokens) / (time.perf_counter() - self._start))

    @property
    def tokens_per_second(self) -> float | None:
        """The median; None with fewer than two steps."""
        return median(self._rates[1:]) if len(self._rates) > 1 else None
