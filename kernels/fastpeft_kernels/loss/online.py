"""Gradients of each token's nll in its own hidden state and s, out of the forward pass.

In the sum over words softmax's numerators can stand for its probabilities until their sum is known, as in attention
with K = V = W (FlashAttention's online softmax): d nll / d h = sum_v p[v] W[v] - W[y] comes out of the pass that makes
the logits, and none are made a second time. The label's word is left out of the sum, and added as
-(sum of other p) W[y].

Source: Milakov and Gimelshein 2018, arXiv:1805.02867; FlashAttention-2, Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..common.shapes import rounds
from .blocks import Blocks
from .label_rows import label_rows
from .problem import Needs, Problem, Tokens, Words, kept_dtype
from .products import add_product, rank_factors
from .steps import Known

_PIECE = 512  # rows that are scaled at a time: on a CPU torch casts 16 bits in memory of their own


class RowGradients:
    """d nll / d hidden and d nll / d s of every token: `hidden` and `s`, in `kept_dtype`, None where not wanted."""

    def __init__(self, problem: Problem, needs: Needs, blocks: Blocks) -> None:
        self.problem = problem
        self.hidden: Tensor | None = None
        self.s: Tensor | None = None
        count = min(blocks.tokens, problem.tokens)
        if needs.hidden:
            self.hidden = problem.empty(problem.hidden.shape[1], dtype=kept_dtype(problem.hidden.dtype))
            self._sums = None if problem.sums_in_place else problem.sums(count, problem.hidden.shape[1])
        if needs.s and problem.s is not None:
            self.s = problem.empty(problem.s.shape[1], dtype=kept_dtype(problem.s.dtype))
            self._sums_s = problem.sums(count, problem.s.shape[1])

    def begin(self, tokens: Tokens) -> None:
        """A new block of tokens."""
        self._tokens, count = tokens, tokens.last - tokens.first
        if self.hidden is not None:
            self._block = self.hidden[tokens.first : tokens.last] if self._sums is None else self._sums[:count]
        if self.s is not None:
            self._block_s = self._sums_s[:count]

    def add(self, weights: Tensor, words: Words, factor: Tensor, rescale: Callable[[Tensor, Tensor], None]) -> None:
        """The part of a chunk: what `online_step` wrote (T, C), and `Running.factor`."""
        begin = words.first == 0
        if self.hidden is not None:
            if not begin:
                rescale(self._block, factor)
            add_product(self._block, weights, words.w, begin)
        if self.s is not None and words.b is not None:
            if not begin:
                rescale(self._block_s, factor)
            add_product(self._block_s, *rank_factors(weights, words.b), begin)

    def finish(self, found: Known, slope: Tensor, room: Tensor) -> None:
        """Divides the block's sums, and adds the label's word.

        Args:
            room: of `label_rows`.
        """
        problem, first, labels = self.problem, self._tokens.first, self._tokens.labels
        factor, of_label = (found.inverse * problem.scale)[:, None], (found.others * slope)[:, None]
        if self.hidden is not None:
            served = self._tokens.room
            for part, rows in label_rows(problem.weight, labels, problem.dtype, room):
                gradient = self._block[part].mul_(factor[part]).addcmul_(of_label[part], rows, value=-1)
                if self._sums is not None:
                    problem.put(self.hidden, first + part.start, gradient, None if served is None else served[part])
        if self.s is not None and problem.b is not None:
            rows = problem.b.index_select(0, labels)
            problem.put(self.s, first, self._block_s.mul_(factor).addcmul_(of_label, rows, value=-1))


def scaled_rows(
    rows: Tensor, factor: Tensor, of_label: Tensor | None, labels: Iterable[tuple[slice, Tensor]], spend: bool
) -> Tensor:
    """factor * rows + of_label * (the label's row), in the dtype of rows.

    Args:
        rows: (tokens, features), `hidden` or `s` of `RowGradients`.
        factor, of_label: (tokens,); None for no label's row.
        labels: parts of the tokens with their labels' rows, one after the other; looked at with `of_label` only.
        spend: whether `rows` may be overwritten, and returned.
    """
    out = rows if spend else torch.empty_like(rows)
    if of_label is None:
        for first in rounds(range(0, rows.shape[0], _PIECE), rows.device):
            part = slice(first, first + _PIECE)
            torch.mul(rows[part], factor[part, None], out=out[part])
    else:
        for part, of_part in labels:
            wide = torch.mul(rows[part], factor[part, None])
            out[part].copy_(wide.addcmul_(of_label[part, None], of_part))
    return out
