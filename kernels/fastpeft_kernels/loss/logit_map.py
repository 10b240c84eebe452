"""From the products of a head to its logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitMap(NamedTuple):
    """z = cap(scale * (raw + bias)), with cap(x) = softcap * tanh(x / softcap); see `Head`.

    Attributes:
        bias: (words,) of the words at hand, contiguous, any floating dtype; or None.
        scale, softcap: see `Head`.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


PLAIN = LogitMap()
"""Where what is given are the logits."""
