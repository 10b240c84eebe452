"""The tasks' rows as one data set, and the order in which they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from fastpeft.data.encoded import Encoded

TASK = "task"
"""Column with each row's task, by its number."""


def together(parts: Sequence[Encoded], numbers: Sequence[int]) -> Encoded:
    """All rows, one task after the other.

    Args:
        parts: of each task, encoded by one tokenizer for the same kind of model.
        numbers: of the tasks.
    """
    import datasets

    marked = [part.rows.add_column(TASK, [number] * len(part)) for part, number in zip(parts, numbers, strict=True)]
    names = [name for name in marked[0].column_names if all(name in rows.column_names for rows in marked)]
    marked = [rows.select_columns(names) for rows in marked]
    rows = datasets.concatenate_datasets([rows.cast(marked[0].features) for rows in marked])
    were_cut = tuple(cut for part in parts for cut in part.were_cut)
    raw_numbers = tuple(number for part in parts for number in part.numbers)
    cut, dropped, tokens = (sum(getattr(part, name) for part in parts) for name in ("cut", "dropped", "tokens"))
    return Encoded(rows, cut, dropped, tokens, were_cut, parts[0].raw, raw_numbers)


class TaskSampler(Sampler[int]):
    """Places of rows, drawn by the seed and the epoch; an epoch has as many as there are rows.

    A task's rows come in an order of their own, each once before one comes again.

    Args:
        sizes: rows of each task, in the order in which they lie.
        seed: of the run.
        shares: called with the place of a draw in the run, gives each task's share; None: every row once an epoch.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shares: Callable[[int], Sequence[float]] | None) -> None:
        self._sizes, self._seed, self._shares = list(sizes), seed, shares
        self.epoch = 0

    def __len__(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        if self._shares is None:
            yield from torch.randperm(len(self), generator=generator).tolist()
            return
        starts = [sum(self._sizes[:task]) for task in range(len(self._sizes))]
        waiting: list[list[int]] = [[] for _ in self._sizes]
        for place in range(len(self)):
            shares = torch.tensor(self._shares(self.epoch * len(self) + place), dtype=torch.float64)
            task = int(torch.multinomial(shares, 1, generator=generator))
            if not waiting[task]:
                waiting[task] = torch.randperm(self._sizes[task], generator=generator).tolist()
            yield starts[task] + waiting[task].pop()


def by_temperature(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares that grow with a task's rows to the power of 1 / temperature."""
    powers = [size ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def by_loss(windows: Sequence[Sequence[float]], window: int) -> list[float] | None:
    """Shares in a window that grow with the part of its first loss that a task still has; None where that is not known.

    The windows up to the one before the last count, because batches are made ahead of the steps that use them.

    Args:
        windows: mean losses of the full windows, by task.
        window: number of the one that is drawn for.
    """
    known = windows[: max(0, window - 1)]
    if not known:
        return None
    kept = [last / first if first > 0 else 1.0 for first, last in zip(known[0], known[-1], strict=True)]
    kept = [value if value == value else 1.0 for value in kept]
    return [value / sum(kept) for value in kept]
