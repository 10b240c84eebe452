"""Attention in blocks of queries and keys: which blocks there are, what is seen in them, and their scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.random import dropout_bits, keep_threshold
from .masks import Mask, dense_mask
from .scores import Scores


class Sizes(NamedTuple):
    """The most rows of one kv head, and keys, of a block; and scores of all kv heads that are computed together.

    And terms of several heads that one product sums over, None for any number; those of one head stay together.
    """

    rows: int
    keys: int
    scores: int
    terms: int | None = None


CPU = Sizes(256, 512, 256 * 512)  # two such blocks of fp32 stay in the second-level cache
GPU = Sizes(1024, 1024, 1 << 25)  # 128 MB, and each operation is worth its launch
# cuBLAS may add a fp32 product's terms one after the other: the fewer, the smaller the error. PyTorch's eager attention
# has a product for each head; one over all heads that share a key erred up to three times as much.
GPU_FP32 = Sizes(256, 512, 1 << 25, 64)


class Part(NamedTuple):
    """Batches and heads that are computed together."""

    batches: slice
    kv_heads: slice
    heads: slice

    def of(self, x: Tensor, queries: slice, keys: slice) -> Tensor:
        """Its part of what broadcasts to (batch, heads, queries, keys), with these four dimensions."""
        x = x.view((1,) * (4 - x.dim()) + x.shape)
        at = (self.batches, self.heads, queries, keys)
        return x[tuple(slice(None) if size == 1 else where for size, where in zip(x.shape, at, strict=True))]

    def rows_of(self, x: Tensor, columns: slice) -> Tensor:
        """Its part of (batch or 1, columns)."""
        return x[:, columns] if x.shape[0] == 1 else x[self.batches, columns]


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of q and k, and how they are cut."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    sizes: Sizes

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Plan:
        sizes = (GPU_FP32 if q.dtype == torch.float32 else GPU) if q.device.type == "cuda" else CPU
        return cls(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], sizes)

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def query_step(self) -> int:
        return min(self.queries, max(16, self.sizes.rows // self.groups))

    @property
    def key_step(self) -> int:
        return min(self.keys, self.sizes.keys)

    @property
    def together(self) -> int:
        """How many kv heads are computed at once."""
        return max(1, self.sizes.scores // (self.groups * self.query_step * self.key_step))

    def parts(self) -> Iterator[Part]:
        batches, heads = max(1, self.together // self.kv_heads), min(self.kv_heads, self.together)
        for b in range(0, self.batch, batches):
            for h in range(0, self.kv_heads, heads):
                last = min(h + heads, self.kv_heads)
                of_q = slice(h * self.groups, last * self.groups)
                yield Part(slice(b, min(b + batches, self.batch)), slice(h, last), of_q)

    def query_blocks(self) -> Iterator[slice]:
        for first in range(0, self.queries, self.query_step):
            yield slice(first, min(first + self.query_step, self.queries))

    def key_blocks(self, mask: Mask, part: Part, queries: slice) -> Iterator[tuple[slice, bool]]:
        """The blocks that any of the queries may see, and whether all queries see all of the block."""
        seen, full = self._ranges(mask, part, queries)
        for first in range(seen.start, seen.stop, self.key_step):
            keys = slice(first, min(first + self.key_step, seen.stop))
            whole = full.start <= first and keys.stop <= full.stop and mask.dense is None
            if mask.keys is not None:
                some, every = _any_all(part.rows_of(mask.keys, keys))
                if not some:
                    continue
                whole = whole and every
            yield keys, whole

    def _ranges(self, mask: Mask, part: Part, queries: slice) -> tuple[slice, slice]:
        """Keys that any of the queries may see, and keys that all see but for padding."""
        shift = self.keys - self.queries
        first, last, full_first, full_last = 0, self.keys, 0, self.keys
        if mask.left is not None:
            first, full_first = queries.start + shift - mask.left, queries.stop - 1 + shift - mask.left
        if mask.right is not None:
            last, full_last = queries.stop + shift + mask.right, queries.start + 1 + shift + mask.right
        if mask.start is not None and mask.stop is not None:
            if mask.start.device.type != "cpu":  # a look at the values would wait for the device
                full_last = full_first
            else:
                start, stop = part.rows_of(mask.start, queries), part.rows_of(mask.stop, queries)
                first, full_first = max(first, int(start.min())), max(full_first, int(start.max()))
                last, full_last = min(last, int(stop.max())), min(full_last, int(stop.min()))
        first, last = max(first, 0), min(last, self.keys)
        return slice(first, max(first, last)), slice(full_first, full_last)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit numbers on a GPU, in fp32."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def _any_all(x: Tensor) -> tuple[bool, bool]:
    return (True, False) if x.device.type != "cpu" else (bool(x.any()), bool(x.all()))


class Blocks:
    """Computes blocks of scores of one attention, in fp32 (fp64 in fp64), (parts' kv heads, rows, keys of the block).

    The rows of a kv head are its heads' queries, head by head, so that keys need not be repeated. Products are of
    16-bit numbers on a GPU, whose sums are in fp32 all the same, and of fp32 elsewhere.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Mask, scores: Scores) -> None:
        self.plan = plan = Plan.of(q, k)
        self.mask, self.scores = mask, scores
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.factors = q.dtype if q.device.type == "cuda" else self.dtype
        self.relative = None if scores.relative is None else scores.relative.detach().to(self.dtype)
        self.most = min(plan.together, plan.batch * plan.kv_heads) * plan.groups * plan.query_step * plan.key_step

    def buffer(self, like: Tensor) -> Tensor:
        """Room for any block."""
        most = self.most if self.factors == self.dtype else 0
        return torch.empty(most, dtype=self.dtype, device=like.device)

    def rows(self, x: Tensor, part: Part, queries: slice) -> Tensor:
        """(kv heads, rows, features) of (batch, heads, queries, features), in its dtype."""
        found = x[part.batches, part.heads, queries]
        return found.reshape(-1, self.plan.groups * found.shape[2], found.shape[3])

    def keys(self, x: Tensor, part: Part) -> Tensor:
        """(kv heads, keys, features) of (batch, kv_heads, keys, features)."""
        return x[part.batches, part.kv_heads].to(self.factors).reshape(-1, x.shape[2], x.shape[3])

    def product(self, a: Tensor, b: Tensor, buffer: Tensor, factor: float = 1.0) -> Tensor:
        """factor * a bT, in `buffer` where torch can."""
        if self.factors != self.dtype:
            return wide_product(a, b.transpose(1, 2)).mul_(factor)
        shape = (a.shape[0], a.shape[1], b.shape[1])
        out = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
        return torch.baddbmm(out, a, b.transpose(1, 2), beta=0, alpha=factor, out=out)

    def add_product_(self, total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
        """total += factor * a b, of an `a` that was computed here."""
        if self.factors != self.dtype:
            total.add_(wide_product(a.to(self.factors), b), alpha=factor)
        else:
            total.baddbmm_(a, b, alpha=factor)

    def add_sum_over_rows_(self, total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
        """total += factor * aT b, of an `a` that was computed here; head by head where `Sizes.terms` says so."""
        rows, terms = b.shape[1], self.plan.sizes.terms
        if terms is None or rows <= terms:
            self.add_product_(total, a.transpose(1, 2), b, factor)
            return
        queries = rows // self.plan.groups
        for some, of_b in zip(*(x.split(queries * max(1, terms // queries), 1) for x in (a, b)), strict=True):
            self.add_product_(total, some.transpose(1, 2), of_b, factor)

    def split(self, block: Tensor, part: Part) -> Tensor:
        """The same memory as (batches, heads, queries, keys)."""
        batches, heads = part.batches.stop - part.batches.start, part.heads.stop - part.heads.start
        return block.view(batches, heads, -1, block.shape[2])

    def finish(self, block: Tensor, part: Part, queries: slice, keys: slice, whole: bool) -> Tensor | None:
        """Make the scores of the scaled products, in place; gives the tanh of a softcap."""
        scores, tanh = self.scores, None
        if scores.softcap is not None:
            tanh = block.div_(scores.softcap).tanh_().clone()
            block.mul_(scores.softcap)
        four = self.split(block, part)
        if self.relative is not None:
            four.add_(self.by_distance(self.relative[part.heads], queries, keys))
        if scores.bias is not None:
            four.add_(part.of(scores.bias.detach(), queries, keys))
        if not whole and (seen := self._seen(part, queries, keys, block.device)) is not None:
            four.masked_fill_(~seen, -torch.inf)
        return tanh

    def dropped(self, part: Part, queries: slice, keys: slice) -> Tensor:
        """Bool (batches, heads, queries, keys) of the block."""
        assert self.scores.seed is not None
        device = self.scores.seed.device
        batch, head = (torch.arange(at.start, at.stop, device=device) for at in (part.batches, part.heads))
        streams = batch[:, None] * self.plan.heads + head
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        bits = dropout_bits(self.scores.seed, queries.start, rows, columns, streams, keys.start)
        return bits < keep_threshold(self.scores.dropout)

    def distances(self, queries: slice, keys: slice) -> slice:
        """The columns of `relative` that a block reads."""
        first = keys.start - (queries.stop - 1) + self.plan.queries - 1
        return slice(first, first + (queries.stop - queries.start) + (keys.stop - keys.start) - 1)

    def by_distance(self, relative: Tensor, queries: slice, keys: slice) -> Tensor:
        """(heads, queries, keys) of the block: each row begins one column before that of the query above."""
        return relative[:, self.distances(queries, keys)].unfold(1, keys.stop - keys.start, 1).flip(1)

    def _seen(self, part: Part, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """`dense_mask` of the block: its own queries and keys are counted from 0."""
        mask, plan = self.mask, self.plan
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        shift = (queries.start + plan.keys - plan.queries - keys.start) - (columns - rows)
        ranges = [None if x is None else part.rows_of(x, queries) - keys.start for x in (mask.start, mask.stop)]
        cut = Mask(
            left=None if mask.left is None else mask.left - shift,
            right=None if mask.right is None else mask.right + shift,
            start=ranges[0],
            stop=ranges[1],
            keys=None if mask.keys is None else part.rows_of(mask.keys, keys),
            dense=None if mask.dense is None else part.of(mask.dense, queries, keys),
        )
        return dense_mask(cut, rows, columns, device)
