"""Sums of products with a gradient in raw logits: the gradients of what these are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Blocks
from .problem import Needs, Problem, Tokens, Words
from .products import add_product, rank_factors


class Sums:
    """Sums of a block's tokens over words (hidden, s), and of words over all tokens (weight, bias, b)."""

    def __init__(self, problem: Problem, needs: Needs, blocks: Blocks, weight_dtype: torch.dtype) -> None:
        self.problem, features, words = problem, problem.hidden.shape[1], problem.words
        rank = 0 if problem.s is None else problem.s.shape[1]
        count = min(blocks.tokens, problem.tokens)
        make = torch.empty if problem.tokens else torch.zeros
        self.hidden = problem.empty(features, dtype=problem.hidden.dtype) if needs.hidden else None
        self._block = problem.sums(count, features) if needs.hidden and not problem.sums_in_place else None
        self.s = problem.empty(rank, dtype=problem.wide) if needs.s else None
        self._block_s = problem.sums(count, rank) if needs.s else None
        self.weight = make(words, features, dtype=weight_dtype, device=problem.device) if needs.weight else None
        self.bias = torch.zeros(words, dtype=torch.float64, device=problem.device) if needs.bias else None
        self.b = problem.sums(words, rank).zero_() if needs.b else None

    def begin(self, first: int, last: int) -> None:
        self._place = (first, last)

    def add(self, raw: Tensor, tokens: Tokens, words: Words) -> None:
        place, begin = slice(words.first, words.last), words.first == 0
        if self.hidden is not None:
            add_product(self._of_hidden(), raw, words.w, begin)
        if self._block_s is not None and words.b is not None:
            add_product(self._block_s[: raw.shape[0]], *rank_factors(raw, words.b), begin)
        if self.weight is not None:
            self._add_weight(self.weight[place], raw.t(), tokens)
        if self.bias is not None:
            self.bias[place] += raw.sum(0, dtype=self.problem.wide)
        if self.b is not None and tokens.s is not None:
            add_product(self.b[place], *rank_factors(raw.t(), tokens.s), begin=False)

    def finish(self) -> None:
        """The block's rows, where they were summed in memory of their own."""
        first, last = self._place
        if self.hidden is not None and self._block is not None:
            self.problem.put(self.hidden, first, self._block[: last - first])
        if self.s is not None and self._block_s is not None:
            self.problem.put(self.s, first, self._block_s[: last - first])

    def _of_hidden(self) -> Tensor:
        first, last = self._place
        if self._block is not None:
            return self._block[: last - first]
        assert self.hidden is not None
        return self.hidden[first:last]

    def _add_weight(self, sums: Tensor, raw_t: Tensor, tokens: Tokens) -> None:
        if sums.dtype.itemsize >= self.problem.wide.itemsize:
            add_product(sums, raw_t, tokens.x, begin=tokens.first == 0)
        elif sums.dtype == raw_t.dtype:
            torch.mm(raw_t, tokens.x, out=sums)
        else:
            sums.copy_(torch.mm(raw_t, tokens.x))
