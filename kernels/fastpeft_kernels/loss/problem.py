"""What the loops of a fused loss work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..common.shapes import rounds
from ..weights import FrozenWeight
from .blocks import Blocks, Sizes
from .logit_map import LogitMap


class Needs(NamedTuple):
    """Of which inputs gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    s: bool = False
    b: bool = False

    @property
    def of_tokens(self) -> bool:
        """Whether of those that are sums over words."""
        return self.hidden or self.s

    @property
    def of_words(self) -> bool:
        """Whether of those that are sums over tokens."""
        return self.weight or self.bias or self.b


class Wants(NamedTuple):
    """Beyond nll and lse. Of these only total has a gradient, and none where `mean` alone asks for it."""

    total: bool = False
    entropy: bool = False
    correct: bool = False
    mean: bool = False

    @property
    def sums(self) -> bool:
        """Whether the logits of each token are summed up."""
        return self.total or self.mean


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """Tokens, a head, and in which dtypes they are multiplied; no gradients flow through it.

    Attributes:
        hidden: (tokens, hidden_size).
        weight: (words, hidden_size); a trained weight too, as a view of its values.
        labels: (tokens,) int64 in [0, words) where they are computed.
        computed: (count,) int64, the tokens that are computed, in order; None for all.
        bias: (words,) or None.
        s, b: (tokens, rank) and (words, rank), or None.
        class_weight: (words,) or None; read for `total` alone.
        scale, softcap: see `Head`.
        dtype: of the product with the weight.
        low_dtype: of the product with b.
    """

    hidden: Tensor
    weight: FrozenWeight
    labels: Tensor
    computed: Tensor | None
    bias: Tensor | None
    s: Tensor | None
    b: Tensor | None
    class_weight: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype
    low_dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """How many are computed."""
        return self.hidden.shape[0] if self.computed is None else self.computed.shape[0]

    @property
    def words(self) -> int:
        return self.weight.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def sums_in_place(self) -> bool:
        """Whether the gradient of hidden can be summed up where it is to lie."""
        return self.computed is None and self.hidden.dtype == self.wide

    def sizes(self, *, sums: bool) -> Sizes:
        """What working memory takes.

        Args:
            sums: with sums as wide as hidden for each token.
        """
        features, size, wide = self.weight.shape[1], self.dtype.itemsize, self.wide.itemsize
        summed = sums and not self.sums_in_place
        copied = self.computed is not None or self.hidden.dtype != self.dtype
        of_rank = 0 if self.s is None else 2 * wide * self.s.shape[1]  # a copy and sums
        return Sizes(
            logit=size + (wide if self.low_dtype != self.dtype else 0),
            token=features * (wide * summed + size * copied) + of_rank,
            word=features * size * (not self.weight.is_ready(self.dtype)) + of_rank,
        )

    def map_of(self, first: int, last: int) -> LogitMap:
        """From the products of these words to their logits."""
        return LogitMap(None if self.bias is None else self.bias[first:last], self.scale, self.softcap)

    def sums(self, *shape: int) -> Tensor:
        """Room for sums."""
        return torch.empty(shape, dtype=self.wide, device=self.device)

    def of(self, values: Tensor, first: int, last: int) -> Tensor:
        """The rows of values (all tokens, ...) that belong to the computed tokens first..last - 1."""
        return values[first:last] if self.computed is None else values.index_select(0, self.computed[first:last])

    def put(self, values: Tensor, first: int, rows: Tensor, room: Tensor | None = None) -> None:
        """Writes what `of` reads.

        Args:
            room: as rows, of use in the dtype of values, that may be overwritten; or None.
        """
        last = first + rows.shape[0]
        if self.computed is None:
            values[first:last].copy_(rows)
        else:
            rows = room.copy_(rows) if room is not None and room.dtype == values.dtype else rows.to(values.dtype)
            values.index_copy_(0, self.computed[first:last], rows)

    def empty(self, *columns: int, dtype: torch.dtype) -> Tensor:
        """(all tokens, *columns) to `put` into; zeros for tokens that are not computed."""
        shape = (self.hidden.shape[0], *columns)
        make = torch.empty if self.computed is None else torch.zeros
        return make(shape, dtype=dtype, device=self.device)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that wait for the loss's own: in fp16 small ones are nothing before its scale makes them larger."""
    return torch.float32 if dtype == torch.float16 else dtype


class Tokens(NamedTuple):
    """A block of computed tokens: x (T, hidden_size) and s (T, rank) in the dtypes of the products, labels (T,).

    Attributes:
        room: x where it may be overwritten when it has served, or None.
    """

    first: int
    last: int
    x: Tensor
    s: Tensor | None
    labels: Tensor
    room: Tensor | None


class Words(NamedTuple):
    """A chunk of words: w (C, hidden_size), b (C, rank), bias (C,), class_weight (C,)."""

    first: int
    last: int
    w: Tensor
    b: Tensor | None
    bias: Tensor | None
    class_weight: Tensor | None


def token_blocks(problem: Problem, blocks: Blocks, room: Tensor | None = None) -> Iterator[Tokens]:
    """Blocks of computed tokens, x of each valid until the next is asked for.

    Args:
        room: of `room_of_block`, for another walk in the same memory.
    """
    room = room_of_block(problem, blocks) if room is None else room
    for first in rounds(range(0, problem.tokens, blocks.tokens), problem.device):
        yield token_block(problem, first, min(first + blocks.tokens, problem.tokens), room)


def room_of_block(problem: Problem, blocks: Blocks) -> Tensor | None:
    """Where the rows of a block are gathered; None where they are not."""
    if problem.computed is None or problem.hidden.dtype != problem.dtype:
        return None
    return problem.hidden.new_empty((min(blocks.tokens, problem.tokens), problem.hidden.shape[1]))


def token_block(problem: Problem, first: int, last: int, room: Tensor | None = None) -> Tokens:
    s = None if problem.s is None else problem.of(problem.s, first, last).to(problem.low_dtype)
    if room is None or problem.computed is None:
        x = problem.of(problem.hidden, first, last).to(problem.dtype)
    else:
        x = room = torch.index_select(problem.hidden, 0, problem.computed[first:last], out=room[: last - first])
    return Tokens(first, last, x, s, problem.of(problem.labels, first, last), room)


def decoded_chunks(weight: FrozenWeight, dtype: torch.dtype, words: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last, rows first..last - 1 in a dtype), the rows valid until the next are asked for."""
    ready, room = weight.ready(dtype), None
    if ready is None and weight.fills:
        room = torch.empty((min(words, weight.shape[0]), weight.shape[1]), dtype=dtype, device=weight.device)
    for first in rounds(range(0, weight.shape[0], words), weight.device):
        last = min(first + words, weight.shape[0])
        if ready is not None:
            yield first, last, ready[first:last]
        elif room is not None:
            yield first, last, weight.decode(out=room[: last - first], rows=(first, last))
        else:
            yield first, last, weight.decode(rows=(first, last), dtype=dtype)


def padded(columns: int) -> int:
    return -(-columns // 8) * 8


class Kept(Protocol):
    """Where raw logits were kept: see `KeptLogits`."""

    def take(self, raw: Tensor, tokens: Tokens, words: Words) -> int: ...


class Vocabulary:
    """The chunks of words, and room for the raw logits of a block under one; or, `whole`, under all of them."""

    def __init__(self, problem: Problem, blocks: Blocks, *, whole: bool = False) -> None:
        self.problem, self.step, self.whole = problem, min(blocks.words, problem.words), whole
        # Rows begin at multiples of 16 bytes, without which matrix products of 16 bits are slow.
        room = (min(blocks.tokens, problem.tokens), padded(problem.words if whole else self.step))
        self._raw = problem.hidden.new_empty(room, dtype=problem.dtype)

    def __iter__(self) -> Iterator[Words]:
        problem = self.problem
        for first, last, w in decoded_chunks(problem.weight, problem.dtype, self.step):
            b = None if problem.b is None else problem.b[first:last].to(problem.low_dtype)
            bias = None if problem.bias is None else problem.bias[first:last]
            classes = None if problem.class_weight is None else problem.class_weight[first:last]
            yield Words(first, last, w, b, bias, classes)

    def room(self) -> Tensor:
        """(rows, hidden_size): the memory of the logits, when they have served."""
        features = self.problem.hidden.shape[1]
        rows = self._raw.numel() // max(1, features)
        return self._raw.view(-1)[: rows * features].view(rows, features)

    def rows(self, tokens: Tokens) -> Tensor:
        """x W^T + s B^T of all words, (T, words), in memory that the next call uses again; only where `whole`."""
        for words in self:
            self.raw(tokens, words)
        return self._raw[: tokens.last - tokens.first, : self.problem.words]

    def raw(self, tokens: Tokens, words: Words, kept: Kept | None = None) -> Tensor:
        """x W^T + s B^T, (T, C), in memory that the next call uses again, or in its place in `rows`.

        Args:
            kept: has those of the first tokens, perhaps.
        """
        first = words.first if self.whole else 0
        raw = self._raw[: tokens.last - tokens.first, first : first + words.last - words.first]
        known = 0 if kept is None else kept.take(raw, tokens, words)
        made = raw[known:]
        if made.shape[0]:
            torch.mm(tokens.x[known:], words.w.t(), out=made)
            if tokens.s is not None and words.b is not None:
                if words.b.dtype == raw.dtype:
                    made.addmm_(tokens.s[known:], words.b.t())
                else:
                    made.add_(torch.mm(tokens.s[known:], words.b.t()))
        return raw
