"""Where a teacher's logits come from, a block of tokens at a time: a head, or a store of the largest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .logit_map import PLAIN, LogitMap
from .problem import Problem, Vocabulary, padded, token_block


@dataclass(frozen=True, eq=False, slots=True)
class TeacherHead:
    """Hidden states and a head; the labels of `problem` are not looked at."""

    problem: Problem

    @property
    def dtype(self) -> torch.dtype:
        return self.problem.dtype

    @property
    def bytes_a_word(self) -> int:
        """Of a decoded row of the weight."""
        return 0 if self.problem.weight.is_ready(self.dtype) else self.problem.weight.shape[1] * self.dtype.itemsize

    def map_of(self, first: int, last: int) -> LogitMap:
        return self.problem.map_of(first, last)

    def room(self, blocks: Blocks, words: int, *, whole: bool) -> HeadLogits:
        return HeadLogits(self.problem, blocks, whole)


class HeadLogits:
    """Raw logits of a head, in memory that is used again."""

    def __init__(self, problem: Problem, blocks: Blocks, whole: bool) -> None:
        self.problem, self._vocabulary = problem, Vocabulary(problem, blocks, whole=whole)

    def rows(self, first: int, last: int) -> Tensor:
        """(last - first, words), of computed tokens; only where `whole`."""
        return self._vocabulary.rows(token_block(self.problem, first, last))

    def chunks(self, first: int, last: int) -> Iterator[Tensor]:
        """(last - first, C) of one chunk of words after the other."""
        tokens = token_block(self.problem, first, last)
        for words in self._vocabulary:
            yield self._vocabulary.raw(tokens, words)


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
    def bytes_a_word(self) -> int:
        return 0

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
        return next(self.chunks(first, last))

    def chunks(self, first: int, last: int) -> Iterator[Tensor]:
        logits, words = (self._of(x, first, last) for x in (self.given.logits, self.given.words))
        for start in range(0, self.words, self.step):
            width = min(self.step, self.words - start)
            room = self._room[: last - first].fill_(-torch.inf)
            local = words - start
            room.scatter_(1, torch.where((local >= 0) & (local < width), local, self.step), logits)
            yield room[:, :width]

    def _of(self, values: Tensor, first: int, last: int) -> Tensor:
        computed = self.given.computed
        return values[first:last] if computed is None else values.index_select(0, computed[first:last])
