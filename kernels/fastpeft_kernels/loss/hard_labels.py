"""A loss of labels beside a divergence from a teacher, in one gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HardLabels(NamedTuple):
    """What the gradient of sum_t d_nll nll, at temperature 1, is made of; (tokens,) each.

    Attributes:
        first: the first word of the chunk at hand.
        labels: int64.
        top, inverse, others: see `steps.gradient_step`.
        d_nll: zero where a token does not count.
    """

    first: int
    labels: Tensor
    top: Tensor
    inverse: Tensor
    others: Tensor
    d_nll: Tensor
