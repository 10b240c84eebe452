"""Attention by PyTorch's operations on blocks of queries and keys: any device, any dtype, memory linear in tokens.

Source: FlashAttention-2, Dao 2023, arXiv:2307.08691, for the order of computation; the softmax of a row that is met in
pieces is from Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Blocks, Part
from .gradients import Gradients, Needs
from .masks import Mask
from .scores import Scores


@torch.no_grad()
def attention_blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out, lse), as `api.attention` says; without a gradient."""
    blocks = Blocks(q, k, mask, scores)
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
    lse = torch.empty((batch, heads, queries), dtype=blocks.dtype, device=q.device)
    buffer = blocks.buffer(q)
    for part in blocks.plan.parts():
        k_part, v_part = blocks.keys(k, part), blocks.keys(v, part)
        for at in blocks.plan.query_blocks():
            q_rows = blocks.rows(q, part, at).to(blocks.factors)
            result, log = _rows(blocks, q_rows, k_part, v_part, part, at, buffer)
            out[part.batches, part.heads, at] = blocks.split(result, part)
            lse[part.batches, part.heads, at] = blocks.split(log, part)[..., 0]
    return out, lse


def _rows(
    blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, part: Part, queries: slice, buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """(kv heads, rows, v_features), (kv heads, rows, 1) of one block of queries."""
    scores = blocks.scores
    total = torch.zeros((), dtype=blocks.dtype, device=q.device)
    acc = total.new_zeros(*q.shape[:2], v.shape[2])
    most = torch.full((), -torch.inf, dtype=blocks.dtype, device=q.device)
    if scores.sinks is not None:
        sinks = scores.sinks[part.heads].to(blocks.dtype)[None, :, None, None]
        most = sinks.expand(-1, -1, queries.stop - queries.start, 1).reshape(-1, q.shape[1], 1)
        most = most.repeat(q.shape[0] // most.shape[0], 1, 1)
        total = torch.ones_like(most)
    for keys, whole in blocks.plan.key_blocks(blocks.mask, part, queries):
        weights = blocks.product(q, k[:, keys], buffer, scores.scale)
        blocks.finish(weights, part, queries, keys, whole)
        before, most = most, torch.maximum(most, weights.amax(-1, keepdim=True))
        base = most.masked_fill(most == -torch.inf, 0.0)
        weights.sub_(base).exp_()
        rescale = torch.exp(before - base)
        total = total * rescale + weights.sum(-1, keepdim=True)
        if scores.dropout > 0.0:
            blocks.split(weights, part).masked_fill_(blocks.dropped(part, queries, keys), 0.0)
        acc = acc * rescale
        blocks.add_product_(acc, weights, v[:, keys])
    shape = (*q.shape[:2], 1)
    total, most = total.expand(shape), most.expand(shape)
    result = acc / (total * (1.0 - scores.dropout)).masked_fill(total == 0.0, 1.0)
    return result, most + total.log()


@torch.no_grad()
def attention_backward_blockwise(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scores: Scores,
    needs: Needs,
) -> Gradients:
    """The gradients that are wanted, from what `attention_blockwise` took and gave."""
    blocks = Blocks(q, k, mask, scores)
    found = _Backward(blocks, needs, q, k, v)
    for part in blocks.plan.parts():
        found.add(part, dout, q, k, v, out, lse)
    return found.gradients()


class _Backward:
    """Sums of gradients."""

    def __init__(self, blocks: Blocks, needs: Needs, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.blocks, self.needs = blocks, needs
        self.dq, self.dk, self.dv = (
            torch.empty_like(x) if flag else None for x, flag in zip((q, k, v), needs[:3], strict=True)
        )
        scores = blocks.scores
        self.drelative, self.dbias, self.dsinks = (
            torch.zeros(x.shape, dtype=blocks.dtype, device=x.device) if flag and x is not None else None
            for x, flag in zip((scores.relative, scores.bias, scores.sinks), needs[3:], strict=True)
        )
        self.of_scores = needs.q or needs.k or needs.relative or needs.bias
        self.buffers = [blocks.buffer(q) for _ in range(2 if self.of_scores else 1)]

    def add(self, part: Part, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """All gradients of these batches and heads."""
        blocks = self.blocks
        k_part, v_part = blocks.keys(k, part), blocks.keys(v, part)
        dk = torch.zeros_like(k_part, dtype=blocks.dtype) if self.dk is not None else None
        dv = torch.zeros_like(v_part, dtype=blocks.dtype) if self.dv is not None else None
        for at in blocks.plan.query_blocks():
            q_rows, dout_rows = (blocks.rows(x, part, at).to(blocks.factors) for x in (q, dout))
            log = blocks.rows(lse[..., None], part, at)
            delta = (dout_rows.to(blocks.dtype) * blocks.rows(out, part, at)).sum(-1, keepdim=True)
            # nothing is seen: every weight is exp(-inf)
            base = log.masked_fill(log == -torch.inf, torch.inf)
            dq = torch.zeros_like(q_rows, dtype=blocks.dtype) if self.dq is not None else None
            key_blocks = list(blocks.plan.key_blocks(blocks.mask, part, at))
            for keys, whole in key_blocks:
                # Of a whole row delta is the sum of what it is taken from: exact where few keys are seen
                known = None if len(key_blocks) == 1 and out.dtype == blocks.dtype else delta
                used = self._block(part, at, keys, whole, q_rows, k_part, v_part, dout_rows, base, known, dq, dk, dv)
                delta = delta if used is None else used
            if self.dsinks is not None:
                self._add_sinks(part, at, log, delta)
            if self.dq is not None and dq is not None:
                self.dq[part.batches, part.heads, at] = blocks.split(dq, part)
        for grad, found in ((self.dk, dk), (self.dv, dv)):
            if grad is not None and found is not None:
                grad[part.batches, part.kv_heads] = found.view(*grad[part.batches, part.kv_heads].shape)

    def _block(
        self,
        part: Part,
        queries: slice,
        keys: slice,
        whole: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
    ) -> Tensor | None:
        """Gives delta, which is made here for None where the scores' gradients are wanted."""
        blocks, scores = self.blocks, self.blocks.scores
        weights = blocks.product(q, k[:, keys], self.buffers[0], scores.scale)
        tanh = blocks.finish(weights, part, queries, keys, whole)
        weights.sub_(lse).exp_()
        dropped = blocks.dropped(part, queries, keys) if scores.dropout > 0.0 else None
        kept = 1.0 / (1.0 - scores.dropout)
        if self.of_scores:
            dscores = blocks.product(dout, v[:, keys], self.buffers[1], kept)
            if dropped is not None:
                blocks.split(dscores, part).masked_fill_(dropped, 0.0)
            if delta is None:
                delta = (dscores * weights).sum(-1, keepdim=True)
            dscores.sub_(delta).mul_(weights)
            self._add_biases(part, queries, keys, dscores)
            if tanh is not None:
                dscores.mul_(tanh.square_().neg_().add_(1.0))
            if dq is not None:
                blocks.add_product_(dq, dscores, k[:, keys], scores.scale)
            if dk is not None:
                blocks.add_sum_over_rows_(dk[:, keys], dscores, q, scores.scale)
        if dv is not None:
            if dropped is not None:
                blocks.split(weights, part).masked_fill_(dropped, 0.0)
            blocks.add_sum_over_rows_(dv[:, keys], weights, dout, kept)
        return delta

    def _add_biases(self, part: Part, queries: slice, keys: slice, dscores: Tensor) -> None:
        four = self.blocks.split(dscores, part)
        if self.dbias is not None:
            grad = part.of(self.dbias, queries, keys)
            one = [i for i in range(4) if grad.shape[i] == 1 < four.shape[i]]
            grad.add_(four.sum(one, keepdim=True) if one else four)
        if self.drelative is not None:
            heads, rows, columns = four.shape[1:]
            # The rows, the last first, each begins one column later: then distances stand under each other.
            skewed = four.new_zeros(heads, rows, rows + columns)
            under = skewed.as_strided((heads, rows, columns), (rows * (rows + columns), rows + columns + 1, 1))
            under.copy_(four.sum(0).flip(1))
            self.drelative[part.heads, self.blocks.distances(queries, keys)] += skewed.sum(1)[:, :-1]

    def _add_sinks(self, part: Part, queries: slice, lse: Tensor, delta: Tensor) -> None:
        assert self.blocks.scores.sinks is not None and self.dsinks is not None
        sinks = self.blocks.scores.sinks[part.heads].to(lse.dtype)[:, None, None]
        log, delta = self.blocks.split(lse, part), self.blocks.split(delta, part)
        self.dsinks[part.heads] -= (torch.exp(sinks - log) * delta).sum((0, 2, 3))

    def gradients(self) -> Gradients:
        scores = self.blocks.scores
        of_scores = [
            None if grad is None or x is None else grad.to(x.dtype)
            for grad, x in (
                (self.drelative, scores.relative),
                (self.dbias, scores.bias),
                (self.dsinks, scores.sinks),
            )
        ]
        return Gradients(self.dq, self.dk, self.dv, *of_scores)
