"""Running a model without values, on torch's meta device, as it would run on another device, to count what it takes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch

from .within import within

_IMITATED: ContextVar[str | None] = ContextVar("imitated", default=None)
_WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)
_PURPOSE: ContextVar[str] = ContextVar("purpose", default="")


def imitating(kind: str) -> AbstractContextManager[None]:
    """Within it tensors on the meta device take the way of those on `kind`, and make what kernels make there.

    Args:
        kind: "cpu" or "cuda".
    """
    return within(_IMITATED, kind)


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


def weightless() -> AbstractContextManager[None]:
    """What is made within it on the meta device only describes a tensor: there is none like it on the other device."""
    return within(_WEIGHTLESS, True)


def is_weightless() -> bool:
    return _WEIGHTLESS.get()


def empty_for(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """torch.empty of working memory, which is counted under the name of its purpose where there are no values."""
    if imitated(device) is None:
        return torch.empty(shape, dtype=dtype, device=device)
    with within(_PURPOSE, purpose):
        return torch.empty(shape, dtype=dtype, device=device)


def purpose_now() -> str:
    """Of what is being made, see `empty_for`; "" for none."""
    return _PURPOSE.get()
