"""Autograd functions whose call takes the host less time."""

from __future__ import annotations

from typing import Any

import torch


class Node(torch.autograd.Function):
    """An autograd function that looks at torch.func's wrappers only while one of its transforms is active."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As `torch.autograd.Function.apply`, which takes twice as long to look through the arguments."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
