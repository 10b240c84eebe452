"""What the steps of a run took."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from transformers import TrainerCallback


class Costs(TrainerCallback):
    """Counted after each step of this process; a mean is over steps.

    Attributes:
        steps: how many were counted.
        gradient_bytes: of all gradients, mean.
        optimizer_bytes: of the optimizer's state, mean and largest.
        trained: numbers that are trained, mean.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._start = 0.0
        self._seconds: list[float] = []
        self._gradients: list[int] = []
        self._bytes: list[int] = []
        self._trained: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._trained.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
        self._start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._gradients.append(sum(each.grad.nbytes for each in model.parameters() if each.grad is not None))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._start)
        self._bytes.append(state_bytes(optimizer))
        self.steps += 1

    @property
    def seconds(self) -> float | None:
        """Median of a step but for the first, without what is decided after it; None with fewer than two."""
        return median(self._seconds[1:]) if self.steps > 1 else None

    @property
    def gradient_bytes(self) -> float:
        return sum(self._gradients) / max(1, len(self._gradients))

    @property
    def optimizer_bytes(self) -> tuple[float, int]:
        return sum(self._bytes) / max(1, self.steps), max(self._bytes, default=0)

    @property
    def trained(self) -> float:
        return sum(self._trained) / max(1, len(self._trained))

    def record(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        mean, largest = self.optimizer_bytes
        return {
            "steps": self.steps,
            "trained": self.trained,
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": mean,
            "largest_optimizer_bytes": largest,
            "seconds": self.seconds,
        }


def state_bytes(optimizer: Any) -> int:
    """Bytes of the tensors in an optimizer's state; accelerate's wrapper or torch's."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    values = (value for state in states for value in state.values() if hasattr(value, "numel"))
    return sum(value.numel() * value.element_size() for value in values)
