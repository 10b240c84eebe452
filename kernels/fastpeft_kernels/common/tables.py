"""Numbers that the host knows, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def table_on(
    device: torch.device, numbers: Sequence[float] | Sequence[tuple[int, ...]], dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor of these, without waiting for a GPU."""
    with torch.inference_mode(False):
        values = torch.tensor(numbers, dtype=dtype, device="cpu")
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def written_on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """The same, int64, without the host's memory, by a launch for each run of numbers that follow each other.

    For a CUDA graph, which would read that memory whenever it runs, and which not every torch lets pin any.
    """
    begins = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    runs = [numbers[first:last] for first, last in pairwise([*begins, len(numbers)])]
    parts = [torch.arange(run[0], run[-1] + 1, dtype=torch.int64, device=device) for run in runs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)
