"""Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and training ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback

from .saving import at_epoch_end

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """A trainer's callback and a context; handlers are put back when it ends.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.received = self.received or signal.Signals(number)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._agree(args)
        if self.received is not None and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True

    def _agree(self, args: Any) -> None:
        """Processes that train together stop at the same step, whichever of them the signal reached by then."""
        if args.world_size == 1:
            return
        import torch
        from torch import distributed

        number = torch.tensor([self.received or 0], device=args.device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        self.received = signal.Signals(int(number)) if number else None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # The trainer takes a stop for the end of the epoch; evaluating would draw random numbers that no run without a
        # break draws here, and the checkpoint is there already.
        if self.received is not None and state.global_step < state.max_steps:
            control.should_evaluate = control.should_evaluate and at_epoch_end(state)
            control.should_save = at_epoch_end(state)  # once more after the evaluation that belongs here
