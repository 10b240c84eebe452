"""Whose steps lie between the products."""

from __future__ import annotations

from types import ModuleType

import torch

from ..common.device import triton_serves
from ..native.loss import loss_steps_native
from . import native_steps, steps


def steps_of(raw_dtype: torch.dtype, device: torch.device) -> ModuleType:
    """The module with `online_step`, `gradient_step` and `rescale` for raw logits like these."""
    if raw_dtype != torch.float64 and triton_serves(device):
        from . import triton_steps

        return triton_steps
    return native_steps if loss_steps_native(device, raw_dtype) else steps
