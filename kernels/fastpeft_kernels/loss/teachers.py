"""Where a teacher's logits come from, a block of tokens at a time: a head, or a store of the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .blocks import Blocks, Sizes
from .logit_map import PLAIN, LogitMap
from .problem import Problem, Tokens, Vocabulary, Words, padded, token_block

Chunk = Callable[[int, int], Tensor]
"""From first and last of some computed tokens to their logits (last - first, C) of one chunk of words."""


@dataclass(frozen=True, eq=False, slots=True)
class TeacherHead:
    """Hidden states and a head; the labels of `problem` are not looked at."""

    problem: Problem

    @property
    def dtype(self) -> torch.dtype:
        return self.problem.dtype

    @property
    def sizes(self) -> Sizes:
        """What its logits take."""
        return self.problem.sizes(sums=False)

    def map_of(self, first: int, last: int) -> LogitMap:
        return self.problem.map_of(first, last)

    def room(self, blocks: Blocks, words: int, *, whole: bool) -> HeadLogits:
        return HeadLogits(self.problem, blocks, whole)


class HeadLogits:
    """Raw logits of a head, in memory that is used again."""

    def __init__(self, problem: Problem, blocks: Blocks, whole: bool) -> None:
        self.problem, self._vocabulary = problem, Vocabulary(problem, blocks, whole=whole)
        self._tokens: Tokens | None = None  # the last, which is all where there is one block

    def rows(self, first: int, last: int) -> Tensor:
        """(last - first, words), of computed tokens; only where `whole`."""
        return self._vocabulary.rows(token_block(self.problem, first, last))

    def __iter__(self) -> Iterator[Chunk]:
        return (partial(self._raw, words) for words in self._vocabulary)

    def _raw(self, words: Words, first: int, last: int) -> Tensor:
        if self._tokens is None or (self._tokens.first, self._tokens.last) != (first, last):
            self._tokens = None
            self._tokens = token_block(self.problem, first, last)
        return self._vocabulary.raw(self._tokens, words)


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """Logits of k words a token: all other words have -inf.

    Attributes:
        logits: (tokens, k), floating.
        words: (tokens, k) int64, those of a token distinct.
        computed: see `Problem`.
    """

    logits: Tensor
    words: Tensor
    computed: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        return self.logits.dtype

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.dtype.itemsize, 0, 0)

    def map_of(self, first: int, last: int) -> LogitMap:
        return PLAIN

    def room(self, blocks: Blocks, words: int, *, whole: bool) -> GivenLogits:
        return GivenLogits(self, blocks, words, whole)


class GivenLogits:
    """As `HeadLogits`."""

    def __init__(self, given: Given, blocks: Blocks, words: int, whole: bool) -> None:
        self.given, self.words, self.step = given, words, words if whole else min(blocks.words, words)
        count = given.logits.shape[0] if given.computed is None else given.computed.shape[0]
        # What is of other chunks goes into one column more.
        self._room = given.logits.new_empty((min(blocks.tokens, count), padded(self.step + 1)))

    def rows(self, first: int, last: int) -> Tensor:
        return self._raw(range(self.words), first, last)

    def __iter__(self) -> Iterator[Chunk]:
        starts = range(0, self.words, self.step)
        return (partial(self._raw, range(first, min(first + self.step, self.words))) for first in starts)

    def _raw(self, words: range, first: int, last: int) -> Tensor:
        logits, given = (self._of(x, first, last) for x in (self.given.logits, self.given.words))
        room, local = self._room[: last - first].fill_(-torch.inf), given - words.start
        room.scatter_(1, torch.where((local >= 0) & (local < len(words)), local, self.step), logits)
        return room[:, : len(words)]

    def _of(self, values: Tensor, first: int, last: int) -> Tensor:
        computed = self.given.computed
        return values[first:last] if computed is None else values.index_select(0, computed[first:last])
