"""What keys of choices are made of."""

from __future__ import annotations

import torch

from ..common.integers import next_power_of_2

CHECKED_TOKENS = 512
"""At most so many are held against fp64: many GPUs compute it at a fiftieth of fp32's rate, and it takes the memory."""
_NAMES = {
    dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def bucket(number: int, least: int = 1) -> int:
    """The next power of two that is not below either number."""
    return next_power_of_2(max(number, least))


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"; looked up, because keys are made in every call."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")
