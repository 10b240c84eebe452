"""Where and in what a model computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device() -> torch.device:
    """This process's GPU if torch sees one, else the CPU."""
    import torch
    from accelerate import PartialState

    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = PartialState().device.index
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def pick_dtype(name: str, device: torch.device, key: str = "model.dtype") -> torch.dtype:
    """What is computed with.

    Args:
        name: "auto", or a floating dtype's name.
        device: float32 is a CPU's "auto"; a GPU's is bfloat16, or float16 where bfloat16 would be emulated.
        key: what the user calls it.

    Raises:
        UserError: float16 on a CPU.
    """
    import torch

    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name == "float16" and device.type == "cpu":
        raise UserError(f"{key}: expected float32 or bfloat16 on a CPU, got float16")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """As Trainer computes with its `bf16` or `fp16`; nothing for float32."""
    import torch

    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)
