"""Running a model without values, on torch's meta device, as it would run on another device, to count what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_IMITATED: ContextVar[str | None] = ContextVar("imitated", default=None)
_WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)
_PURPOSE: ContextVar[str] = ContextVar("purpose", default="")


@contextmanager
def imitating(kind: str) -> Iterator[None]:
    """Within it tensors on the meta device take the way of those on `kind`, and make what kernels make there.

    Args:
        kind: "cpu" or "cuda".
    """
    token = _IMITATED.set(kind)
    try:
        yield
    finally:
        _IMITATED.reset(token)


def imitated(device: torch.device) -> str | None:
    """The kind of device that tensors on `device` stand for, within `imitating`; None for tensors with values."""
    return _IMITATED.get() if device.type == "meta" else None


def rounds(first: range, device: torch.device) -> range:
    """The rounds of a loop that all make the same: of tensors without values the first two stand for all.

    Args:
        first: where each begins.
    """
    return first[:2] if imitated(device) else first


def kind_of(device: torch.device) -> str:
    """The type of the device, or of what it imitates."""
    return imitated(device) or device.type


@contextmanager
def weightless() -> Iterator[None]:
    """What is made within it on the meta device only describes a tensor: there is none like it on the other device."""
    token = _WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def is_weightless() -> bool:
    return _WEIGHTLESS.get()


def empty_for(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty of working memory, which is counted under the name of its purpose where there are no values."""
    if imitated(device) is None:
        return torch.empty(shape, dtype=dtype, device=device)
    token = _PURPOSE.set(purpose)
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    finally:
        _PURPOSE.reset(token)


def purpose_now() -> str:
    """Of what is being made, see `empty_for`; "" for none."""
    return _PURPOSE.get()
