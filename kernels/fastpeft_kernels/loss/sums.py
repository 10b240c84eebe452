"""Sums of products with a gradient in raw logits: the gradients of what these are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Blocks
from .problem import Needs, Problem, Tokens, Words, kept_dtype
from .products import add_product, rank_factors


class TokenSums:
    """Of hidden and s: sums over words, of a block of tokens after the other. None where not wanted.

    Attributes:
        hidden: (all tokens, hidden_size), in the dtype of the hidden states, or `kept_dtype` of that where it is
            `waiting`.
        s: (all tokens, rank), likewise.
    """

    def __init__(self, problem: Problem, needs: Needs, count: int, *, waiting: bool = False) -> None:
        """
        Args:
            count: tokens that are summed up at a time: those of a block, or all, where blocks come again.
            waiting: for the loss's own gradient, which is not in them yet.
        """
        self.problem, features = problem, problem.hidden.shape[1]
        dtype_of = kept_dtype if waiting else lambda dtype: dtype
        rank = 0 if problem.s is None else problem.s.shape[1]
        count = min(count, problem.tokens)
        self._of_all = count == problem.tokens
        self.hidden = problem.empty(features, dtype=dtype_of(problem.hidden.dtype)) if needs.hidden else None
        self._block = problem.sums(count, features) if needs.hidden and not problem.sums_in_place else None
        self.s = problem.empty(rank, dtype=dtype_of(problem.s.dtype)) if needs.s and problem.s is not None else None
        self._block_s = problem.sums(count, rank) if needs.s else None

    def begin(self, tokens: Tokens) -> None:
        first, last = self._place = (tokens.first, tokens.last)
        self._at, self._room = slice(first, last) if self._of_all else slice(0, last - first), tokens.room

    def add(self, raw: Tensor, words: Words) -> None:
        begin = words.first == 0
        if self.hidden is not None:
            add_product(self._of_hidden(), raw, words.w, begin)
        if self._block_s is not None and words.b is not None:
            add_product(self._block_s[self._at], *rank_factors(raw, words.b), begin)

    def finish(self) -> None:
        """The block's rows, where they were summed in memory of their own."""
        first = self._place[0]
        if self.hidden is not None and self._block is not None:
            self.problem.put(self.hidden, first, self._block[self._at], self._room)
        if self.s is not None and self._block_s is not None:
            self.problem.put(self.s, first, self._block_s[self._at])

    def _of_hidden(self) -> Tensor:
        if self._block is not None:
            return self._block[self._at]
        assert self.hidden is not None
        return self.hidden[slice(*self._place)]


class WordSums:
    """Of the weight, bias and b: sums over tokens, of a chunk of words after the other. None where not wanted.

    Where the blocks of tokens are several a chunk is summed in memory of its own, for one rounding, and because the
    memory of the weight's gradient may still hold that chunk's logits.

    Attributes:
        weight: (words, hidden_size), in the weight's dtype: the memory that was given, or new.
        bias: (words,) and b: (words, rank), in the dtypes of what they belong to.
    """

    def __init__(self, problem: Problem, needs: Needs, blocks: Blocks, memory: Tensor | None) -> None:
        self.problem, words, features = problem, problem.words, problem.hidden.shape[1]
        chunk = min(blocks.words, problem.words)
        make = torch.empty if problem.tokens else torch.zeros
        several = blocks.tokens < problem.tokens
        self.weight = self.bias = self.b = None
        self._weight = self._bias = self._b = None
        if needs.weight:
            self.weight = memory
            if memory is None:
                self.weight = make(words, features, dtype=problem.weight.dtype, device=problem.device)
            self._weight = problem.sums(chunk, features) if several else None
        if needs.bias and problem.bias is not None:
            self.bias = make(words, dtype=problem.bias.dtype, device=problem.device)
            self._bias = torch.empty(chunk, dtype=torch.float64, device=problem.device)
        if needs.b and problem.b is not None:
            rank = problem.b.shape[1]
            self.b = make(words, rank, dtype=problem.b.dtype, device=problem.device)
            self._b = problem.sums(chunk, rank)
        if not problem.tokens:
            self._weight = self._bias = self._b = None

    def add(self, raw: Tensor, tokens: Tokens, words: Words) -> None:
        """Of a chunk all blocks of tokens come one after the other."""
        begin, count = tokens.first == 0, words.last - words.first
        if self.weight is not None:
            if self._weight is not None:
                add_product(self._weight[:count], raw.t(), tokens.x, begin)
            else:
                _into(self.weight[words.first : words.last], raw.t(), tokens.x)
        if self._bias is not None:
            summed = raw.sum(0, dtype=self.problem.wide)
            self._bias[:count].copy_(summed) if begin else self._bias[:count].add_(summed)
        if self._b is not None and tokens.s is not None:
            add_product(self._b[:count], *rank_factors(raw.t(), tokens.s), begin)

    def finish(self, words: Words) -> None:
        """The chunk's rows, where they were summed in memory of their own."""
        place, count = slice(words.first, words.last), words.last - words.first
        for found, sums in ((self.weight, self._weight), (self.bias, self._bias), (self.b, self._b)):
            if found is not None and sums is not None:
                found[place].copy_(sums[:count])


def _into(rows: Tensor, a: Tensor, b: Tensor) -> None:
    """rows = a b, rounded to them afterwards where they are in other 16 bits than a and b, or in fewer."""
    if rows.dtype != a.dtype and rows.dtype.itemsize <= a.dtype.itemsize:
        rows.copy_(torch.mm(a, b))
    else:
        add_product(rows, a, b, begin=True)
