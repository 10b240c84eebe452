"""Ours, where padding has holes, over keys that were put together: those that are seen first, in their order.

Of a query's interval of keys those that are seen then are an interval, too, so that whole blocks need no look at marks.
That costs a copy of k and v, and one of their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autograd
from ..masks import Mask
from .flex_blocks import row_bounds
from .request import Request, absence_of_triton


class Compact:
    """A mask with `keys`, any bounds and intervals, a soft cap and sinks; nothing that counts keys where they were: no
    biases, dense mask and dropout."""

    name = "compact"
    beyond_sdpa = True

    def absence(self, device: torch.device) -> str | None:
        return absence_of_triton(device)

    def version(self) -> str:
        return ""

    def refusal(self, request: Request) -> str | None:
        mask, scores = request.mask, request.scores
        if mask.keys is None:
            return "expected a mask with keys"
        if mask.dense is not None:
            return "expected a mask that is not dense"
        if scores.relative is not None or scores.bias is not None or scores.dropout > 0.0:
            return "expected no biases and no dropout"
        return None

    def run(self, request: Request) -> Tensor:
        q, k, v, mask, scores = request[:5]
        order, intervals = put_together(mask, q.shape[2], k.shape[2])
        order = order.expand(k.shape[0], -1)
        k, v = _Reordered.apply(k, order), _Reordered.apply(v, order)
        return autograd.apply(q, k, v, intervals, scores, "auto", request.deterministic)[0]


def put_together(mask: Mask, queries: int, keys: int) -> tuple[Tensor, Mask]:
    """The order of the keys, int64 (1 or batch, keys), and the intervals of what each query sees of them so.

    Args:
        mask: with `keys`, without `dense`.
        queries, keys: of the call.
    """
    marks = mask.keys
    assert marks is not None
    order = (~marks).to(torch.uint8).argsort(dim=-1, stable=True)
    seen_before = torch.nn.functional.pad(marks.cumsum(-1, dtype=torch.int32), (1, 0))
    bounds = [x.clamp(0, keys).to(torch.int64) for x in row_bounds(mask, queries, keys, marks.device)]
    batch = max(marks.shape[0], bounds[0].shape[0])
    start, stop = (seen_before.expand(batch, -1).gather(1, x.expand(batch, -1)) for x in bounds)
    return order, Mask(start=start, stop=stop)


class _Reordered(torch.autograd.Function):
    """x[batch, :, order[batch]] of (batch, heads, keys, features); the gradient is put back without a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order)
        return _taken(x, order)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Any, None]:  # type: ignore[no-untyped-def]
        (order,) = ctx.saved_tensors
        return _taken(gradient, order.argsort(dim=-1)), None


def _taken(x: Tensor, order: Tensor) -> Tensor:
    entry = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[entry, order].transpose(1, 2)
