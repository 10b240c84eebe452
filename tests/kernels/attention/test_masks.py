"""Masks from what collators and models have, against loops that say what is meant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft_kernels.attention import ranges
from fastpeft_kernels.attention.masks import Mask, bounded, dense_mask

CPU = torch.device("cpu")
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=4)
bounds = st.one_of(st.none(), st.integers(0, 6))


def assert_same(mask: Mask, queries: int, keys: int, seen: Callable[[int, int, int], bool], batch: int = 1) -> None:
    """`seen` is asked with batch, query and key."""
    want = [[[seen(b, i, j) for j in range(keys)] for i in range(queries)] for b in range(batch)]
    found = dense_mask(mask, queries, keys, CPU)
    found = torch.ones(1, dtype=torch.bool) if found is None else found
    assert torch.equal(found.expand(batch, 1, queries, keys)[:, 0], torch.tensor(want).view(batch, queries, keys))


def in_window(distance: int, left: int | None, right: int | None) -> bool:
    """Of a key that is `distance` behind (above 0: later than) the query's position."""
    return (left is None or -distance <= left) and (right is None or distance <= right)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 5)))
def test_causal(queries: int, keys: int, window: int | None) -> None:
    def seen(_: int, i: int, j: int) -> bool:
        position = i + keys - queries
        return j <= position and (window is None or j > position - window)

    assert_same(ranges.causal(window), queries, keys, seen)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(-4, 12), st.integers(-4, 12))
def test_bounds_that_no_query_meets_are_left_out(queries: int, keys: int, left: int, right: int) -> None:
    mask = Mask(left=left, right=right)
    simpler = bounded(mask, queries, keys)
    assert_same(simpler, queries, keys, lambda _, i, j: in_window(j - (i + keys - queries), left, right))
    assert (simpler.left is None) == (left >= keys - 1)
    assert (simpler.right is None) == (right >= queries - 1)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4), st.booleans(), bounds, bounds,
       st.integers(0, 3), st.integers(0, 3))  # fmt: skip
def test_packed(
    documents: list[tuple[int, int]], causal: bool, left: int | None, right: int | None, more: int, more_keys: int
) -> None:
    of_query = [(d, i + k - q) for d, (q, k) in enumerate(documents) for i in range(q)] + [(-1, 0)] * more
    of_key = [(d, j) for d, (_, k) in enumerate(documents) for j in range(k)] + [(-2, 0)] * more_keys

    def seen(_: int, i: int, j: int) -> bool:
        (document, position), (other, at) = of_query[i], of_key[j]
        return document == other and in_window(at - position, left, 0 if causal else right)

    cu_q, cu_k = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in zip(*documents, strict=True))
    mask = ranges.packed(cu_q, len(of_query), cu_k, len(of_key), causal=causal, window=(left, right))
    assert_same(mask, len(of_query), len(of_key), seen)
    assert (mask.start.diff() >= 0).all() and (mask.stop.diff() >= 0).all(), "decreasing, so no block is skipped"


@settings(max_examples=40)
@given(lengths, st.booleans(), bounds, bounds, st.integers(0, 2))
def test_the_ways_to_say_packed_agree(
    documents: list[int], causal: bool, left: int | None, right: int | None, first: int
) -> None:
    tokens = sum(documents)
    if tokens == 0:
        return
    cu_seqlens = torch.tensor([0, *documents]).cumsum(0).int()
    how = {"causal": causal, "window": (left, right)}
    position_ids = torch.cat([torch.arange(n) + first for n in documents])[None]
    seq_idx = torch.cat([torch.full((n,), 3 * d) for d, n in enumerate(documents)])[None].int()
    want = dense_mask(ranges.packed(cu_seqlens, tokens, **how), tokens, tokens, CPU)
    for mask in (ranges.packed_by_position(position_ids, **how), ranges.packed_by_index(seq_idx, **how)):
        assert torch.equal(dense_mask(mask, tokens, tokens, CPU), want)


def test_positions_as_transformers_reads_them() -> None:
    masking_utils = pytest.importorskip("transformers.masking_utils")
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 6], [3, 4, 5, 6, 7, 8, 9, 10]])
    document = masking_utils.find_packed_sequence_indices(position_ids)
    mask = ranges.packed_by_position(position_ids)
    assert_same(mask, 8, 8, lambda b, i, j: j <= i and bool(document[b, i] == document[b, j]), batch=2)


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3))
def test_padding(real: list[list[bool]]) -> None:
    for mask in (torch.tensor(real), torch.tensor(real).long()):
        assert_same(ranges.padding(mask), 3, 5, lambda b, _, j: real[b][j], batch=len(real))


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 4), min_size=1, max_size=2))
def test_chunked(chunk: int, queries: int, past: int, first: list[int]) -> None:
    keys = queries + past

    def seen(b: int, i: int, j: int) -> bool:
        position = i + past
        return j <= position and (j - first[b]) // chunk == (position - first[b]) // chunk

    assert_same(ranges.chunked(chunk, queries, keys, first=torch.tensor(first)), queries, keys, seen, len(first))
    if first == [0]:
        assert_same(ranges.chunked(chunk, queries, keys), queries, keys, seen)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=2), st.integers(1, 7), st.integers(0, 3))
def test_prefix(length: list[int], queries: int, past: int) -> None:
    keys = queries + past
    mask = ranges.prefix(torch.tensor(length), queries, keys)
    assert_same(mask, queries, keys, lambda b, i, j: j < length[b] or j <= i + past, len(length))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ranges.causal(0), ValueError, "window: expected an integer above 0, got 0"),
        (lambda: ranges.chunked(2.0, 3, 3), ValueError, "chunk: expected an integer above 0, got 2.0"),
        (lambda: ranges.padding([1]), TypeError, "attention_mask: expected a Tensor, got list"),
        (
            lambda: ranges.padding(torch.ones(3)),
            ValueError,
            r"attention_mask: expected \(batch or 1, tokens\), got .*3",
        ),
        (lambda: ranges.packed_by_position(torch.ones(1, 3)), TypeError, "position_ids: expected one of torch.int32"),
        (lambda: ranges.packed(torch.tensor([0]), 3), ValueError, r"cu_seqlens_q: expected shape \(documents \+ 1,\)"),
        (
            lambda: ranges.packed(torch.ones(2), 3),
            TypeError,
            "cu_seqlens_q: expected int32 or int64, got torch.float32",
        ),
        (
            lambda: ranges.packed(torch.tensor([0, 3]), 3, keys=4),
            ValueError,
            "cu_seqlens_k: expected a tensor for 4 keys",
        ),
        (
            lambda: ranges.packed(torch.tensor([0, 3]), 3, torch.tensor([0, 2, 4]), 4),
            ValueError,
            r"cu_seqlens_k: expected shape \(2,\) like cu_seqlens_q, got \(3,\)",
        ),
        (
            lambda: ranges.packed(torch.tensor([0, 3]), 3, window=(-1, None)),
            ValueError,
            "window: expected left to be an integer of 0 or more, or None, got -1",
        ),
        (
            lambda: ranges.prefix(torch.ones(1), 2, 2),
            ValueError,
            r"length: expected int32 or int64 \(batch or 1,\), got",
        ),
    ],
)
def test_refused(call: Callable[[], Mask], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
