"""Numbers that the host knows, on a device."""

from __future__ import annotations

from collections.abc import Sequence

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
    """The same, int64, without the host's memory, by a launch for each: for a CUDA graph, which would read that memory
    whenever it runs, and which not every torch lets pin any.
    """
    return torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in numbers])
