"""Checks that several ops share. Messages name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the ops compute in."""


def check_floating(name: str, tensor: Any) -> None:
    """Raise TypeError unless it is a dense floating tensor of any size."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def check_instance(name: str, value: Any, *kinds: type) -> None:
    """Raise TypeError unless `value` is of one of `kinds`."""
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name}: expected a {expected}, got {type(value).__name__}")


def check_device(name: str, device: torch.device, expected: torch.device, like: str = "x") -> None:
    """Raise ValueError unless a tensor is where x, or the argument `like`, is."""
    if device != expected:
        raise ValueError(f"{name}: expected a tensor on {expected} like {like}, got {device}")


def check_tensor(name: str, tensor: Any, device: torch.device, shape: tuple[int, ...], like: str = "x") -> None:
    """Raise TypeError or ValueError unless it is a dense floating tensor of this shape where x, or `like`, is."""
    check_instance(name, tensor, Tensor)
    check_device(name, tensor.device, device, like)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    check_floating(name, tensor)


def check_scaling(name: str, scaling: Any, device: torch.device) -> None:
    """Raise TypeError or ValueError unless it is a number, or a tensor of one that is not trained, where x is."""
    check_instance(name, scaling, float, int, Tensor)
    if isinstance(scaling, Tensor):
        check_tensor(name, scaling, device, ())
        if scaling.requires_grad:
            raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it")


def check_rows(rows: Any, count: int) -> tuple[int, int]:
    """(first, last) of a half-open range of `count` rows; all of them for None."""
    if rows is None:
        return 0, count
    if not isinstance(rows, (tuple, list)) or len(rows) != 2 or any(type(row) is not int for row in rows):
        raise TypeError(f"rows: expected two integers (first, last), got {rows!r}")
    first, last = rows
    if not 0 <= first <= last <= count:
        raise ValueError(f"rows: expected 0 <= first <= last <= {count}, got {rows}")
    return first, last
