"""What a backward is asked for, and what it gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    q: bool = True
    k: bool = True
    v: bool = True
    relative: bool = False
    bias: bool = False
    sinks: bool = False


class Gradients(NamedTuple):
    """One for each that was wanted, in its shape and dtype; None for the others."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    relative: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
