"""Which rows each expert gets: (token, choice) pairs sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import imitated

Span = tuple[int, int, int]


class Routes(NamedTuple):
    """Rows sorted by expert.

    Attributes:
        experts: (rows,) int64, the expert of each row.
        ends: (experts,) int32, behind the last row of each expert.
        spans: (expert, first row, behind the last row) of those that got any, for a loop; None for a grouped product,
            which needs no number on the host.
    """

    experts: Tensor
    ends: Tensor
    spans: Sequence[Span] | None

    @classmethod
    def of_counts(cls, counts: Tensor, rows: int, *, loop: bool) -> Routes:
        """For `rows` rows that are sorted already; counts (experts,), integers, how many each expert has."""
        numbers = torch.arange(counts.shape[0], device=counts.device)
        experts = torch.repeat_interleave(numbers, counts, output_size=rows)
        ends = counts.cumsum(0, dtype=torch.int32)
        return cls(experts, ends, _spans(ends.tolist()) if loop else None)


class Pairs(NamedTuple):
    """The pairs of tokens and their chosen experts, and where they lie once sorted.

    Attributes:
        order: (tokens * top_k,) int64, the pair in each sorted row.
        tokens: (tokens * top_k,) int64, the token in each sorted row.
        shape: (tokens, top_k).
        routes: of the sorted rows.
    """

    order: Tensor
    tokens: Tensor
    shape: tuple[int, int]
    routes: Routes

    @classmethod
    def of_index(cls, index: Tensor, experts: int, *, loop: bool) -> Pairs:
        """index (tokens, top_k): expert in [0, experts) of each pair; the same expert twice for one token is two.

        Raises:
            ValueError: with `loop`, which looks at it on the host, for an expert that there is not.
        """
        flat = index.reshape(-1)
        chosen, order = torch.sort(flat, stable=True)
        first = -1 if loop else 0  # for the one wait to tell of negative numbers, too
        numbers = torch.arange(first, experts, device=flat.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
        spans = None
        if loop:
            below, *counted = _even_ends(flat.numel(), experts) if imitated(flat.device) else ends.tolist()
            if below or counted[-1] != flat.numel():
                raise ValueError(
                    f"index: expected experts in [0, {experts}), got {int(chosen[0])} to {int(chosen[-1])}"
                )
            ends, spans = ends[1:], _spans(counted)
        tokens, top_k = index.shape
        return cls(order, order // max(1, top_k), (tokens, top_k), Routes(chosen.long(), ends, spans))

    def gather(self, x: Tensor) -> Tensor:
        """(rows, features) of (tokens, features)."""
        return x.index_select(0, self.tokens)

    def sum(self, rows: Tensor) -> Tensor:
        """(tokens, features), for each token the sum of its (rows, features); the same in every run."""
        pairs = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return pairs.view(*self.shape, rows.shape[1]).sum(1)


def _spans(ends: list[int]) -> list[Span]:
    found, first = [], 0
    for expert, last in enumerate(ends):
        if last > first:
            found.append((expert, first, last))
        first = last
    return found


def _even_ends(rows: int, experts: int) -> list[int]:
    """Of a routing without numbers: none is negative, and every expert gets as many rows."""
    return [rows * count // experts for count in range(experts + 1)]
