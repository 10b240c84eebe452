"""How well a language model knows texts: losses row by row, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .intervals import Interval, over_rows


@dataclass(frozen=True)
class Losses:
    """Of a language model's rows.

    Attributes:
        sums: float64 array (rows,), each row's cross-entropy in nats, summed over the tokens that are learned.
        tokens: int64 array (rows,), how many these are.
        right: int64 array (rows,), of how many of them the model takes the right one for the likeliest.
    """

    sums: Any
    tokens: Any
    right: Any

    def __len__(self) -> int:
        return len(self.sums)

    def loss(self) -> Interval:
        """A token's, in nats, with its interval over the rows."""
        return over_rows(lambda sums, tokens: float(sums.sum() / tokens.sum()), self.sums, self.tokens)

    def accuracy(self) -> Interval:
        """Share of the tokens that are right, with its interval over the rows."""
        return over_rows(lambda right, tokens: float(right.sum() / tokens.sum()), self.right, self.tokens)

    def perplexity(self) -> Interval:
        """exp of the loss, with its interval over the rows."""
        return Interval(*(math.exp(min(value, 700.0)) for value in self.loss()))  # beyond, a float is no more

    def learned(self) -> Losses:
        """Without rows of which no token is learned."""
        some = self.tokens > 0
        return Losses(self.sums[some], self.tokens[some], self.right[some])

    def since(self, before: Losses) -> Interval:
        """How much higher a token's loss is than in `before`, which has the same rows and tokens; the interval is over
        rows, each of which is compared with itself."""
        return over_rows(lambda more, tokens: float(more.sum() / tokens.sum()), self.sums - before.sums, self.tokens)
