"""What the ops take for an adapter: factors of an update as large as the weight, and its scaling."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LohaAdapter(NamedTuple):
    """The update scaling * (w1_a w1_b) ⊙ (w2_a w2_b), element by element.

    Attributes:
        w1_a, w2_a: (out_features, rank), floating.
        w1_b, w2_b: (rank, in_features).
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scaling: float = 1.0

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self[:4]


class LokrAdapter(NamedTuple):
    """The update scaling * kron(w1, w2).

    Attributes:
        w1: (out_l, in_m), floating.
        w2: (out_k, in_n), where out_l out_k = out_features and in_m in_n = in_features.
    """

    w1: Tensor
    w2: Tensor
    scaling: float = 1.0

    @property
    def factors(self) -> tuple[Tensor, ...]:
        return self[:2]
