"""How much each task counts in a run: its rows, its loss, and what is remembered of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Memory:
    """What a resumed run goes on with; plain numbers.

    Attributes:
        rows: of each task, trained on so far.
        sums, counts: of losses in the window that is not full yet, by task.
        windows: mean losses of each full window, by task; a task that had no rows in it has the one before's.
        conflicts: (step, task, task, cosine of their gradients).
        weights: (step, weight of each task's loss).
    """

    rows: list[int]
    sums: list[float]
    counts: list[int]
    windows: list[list[float]] = field(default_factory=list)
    conflicts: list[list[float]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, tasks: int) -> Memory:
        """An empty one."""
        return cls([0] * tasks, [0.0] * tasks, [0] * tasks)

    def note(self, losses: dict[int, tuple[float, int]]) -> None:
        """A step's mean loss and number of rows, by task."""
        for task, (loss, rows) in losses.items():
            self.rows[task] += rows
            self.sums[task] += loss * rows
            self.counts[task] += rows

    def close_window(self) -> None:
        """Keep the window's means and begin another."""
        before = self.windows[-1] if self.windows else [math.nan] * len(self.rows)
        means = [
            sum_ / count if count else old for sum_, count, old in zip(self.sums, self.counts, before, strict=True)
        ]
        self.windows.append(means)
        self.sums, self.counts = [0.0] * len(self.rows), [0] * len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Weights(nn.Module):
    """Weights of the tasks' losses.

    Args:
        given: one a task, by which the others are multiplied.
        kind: "equal"; "uncertainty", 1 / sigma^2 with a learned log sigma^2 (Kendall et al. 2018, for classes:
            the loss gets half of it too); "dwa", by how much of its loss a task kept from one window to the next
            (Liu et al. 2019).
        temperature: of dwa.
    """

    def __init__(self, given: Sequence[float], kind: str, temperature: float = 2.0) -> None:
        super().__init__()
        self.kind, self.temperature = kind, temperature
        self.register_buffer("given", torch.tensor(list(given)), persistent=False)
        self.log_variances = nn.Parameter(torch.zeros(len(given)), requires_grad=kind == "uncertainty")

    def now(self, memory: Memory) -> Tensor:
        """(tasks,); differentiable where they are learned."""
        given: Tensor = self.given  # type: ignore[assignment]
        if self.kind == "uncertainty":
            return given * torch.exp(-self.log_variances)
        if self.kind == "dwa" and len(memory.windows) > 1:
            before, last = (torch.tensor(means) for means in memory.windows[-2:])
            ratios = (last / before).nan_to_num(1.0)
            return given * len(ratios) * torch.softmax(ratios / self.temperature, 0).to(given)
        return given

    def forward(self, losses: Tensor, tasks: Tensor, memory: Memory) -> Tensor:
        """The mean over rows of their weighted losses.

        Args:
            losses: (rows,).
            tasks: (rows,), each row's task by its number.
            memory: of the run.
        """
        weighed = losses * self.now(memory).to(losses)[tasks]
        if self.kind == "uncertainty":
            weighed = weighed + self.log_variances.to(losses)[tasks] / 2
        return weighed.mean()
