"""Both ops for autograd, in PyTorch's operations: lookups and library products, which run at the memory's speed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.device import autocast_off
from ..common.tracing import as_op

_PIECE = 1 << 24  # numbers that are copied at a time


class TokenEmbedding(torch.autograd.Function):
    """Keeps each id's place among the trained rows."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, ids: Tensor, weight: Tensor, rows: Tensor, index: Tensor, padding_idx: int | None
    ) -> Tensor:
        y, count = F.embedding(ids, weight), rows.shape[0]
        place_of_word = index.new_full((weight.shape[0],), count)
        place_of_word = place_of_word.index_copy(0, index, torch.arange(count, device=index.device))
        places = place_of_word[ids]
        ctx.count, ctx.dtype = count, rows.dtype
        ctx.save_for_backward(places if padding_idx is None else places.masked_fill(ids == padding_idx, count))
        rows = rows.to(weight.dtype)
        if as_op():
            return _put_in(y, places, rows)
        each = max(1, _PIECE // max(1, y.shape[-1]))
        for part, of_part in zip(y.view(-1, y.shape[-1]).split(each), places.view(-1).split(each), strict=True):
            _put_in(part, of_part, rows, out=part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        (places,) = ctx.saved_tensors
        d_rows = None
        if ctx.needs_input_grad[2]:
            # Ids whose row is frozen have the place behind the last, which as padding is passed over.
            sums = _sums_of_rows(dy.reshape(-1, dy.shape[-1]), places.reshape(-1), ctx.count + 1)
            d_rows = sums[: ctx.count].to(ctx.dtype)
        return None, None, d_rows, None, None


def _put_in(y: Tensor, places: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    """y (..., features) with rows (count, features) where a place (...) is one of them."""
    count = rows.shape[0]
    return torch.where((places < count)[..., None], F.embedding(places.clamp(max=count - 1), rows), y, out=out)


def _sums_of_rows(dy: Tensor, places: Tensor, count: int) -> Tensor:
    """(count, features) in fp32 at least: sums of the rows of dy (tokens, features) of each place but the last, a part
    of dy after the other, since each is copied where it is not so wide.
    """
    dtype = torch.promote_types(dy.dtype, torch.float32)
    sums = dy.new_zeros((count, dy.shape[1]), dtype=dtype)
    each = dy.shape[0] if dy.dtype == dtype else max(1, _PIECE // max(1, dy.shape[1]))
    for part, of_part in zip(dy.split(max(1, each)), places.split(max(1, each)), strict=True):
        sums += torch.ops.aten.embedding_dense_backward(part.to(dtype), of_part, count, count - 1, False)
    return sums


class TokenLinear(torch.autograd.Function):
    """Keeps x; the gradient of the result is not written to."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor, rows: Tensor, index: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.dtype = dtype
        with autocast_off(x.device):
            wide = x.to(dtype)
            y, columns = F.linear(wide, weight.to(dtype)), F.linear(wide, rows.to(weight.dtype).to(dtype))
            y = y.index_copy(-1, index, columns) if as_op() else y.index_copy_(-1, index, columns)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight, rows, index)
        ctx.dtype_of_x = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        x, weight, rows, index = ctx.saved_tensors
        dx = d_rows = None
        flat = dy.reshape(-1, dy.shape[-1])
        with autocast_off(dy.device):
            of_tokens = flat.index_select(1, index)
            if ctx.needs_input_grad[0]:
                # A copy, since what is replaced may be anything: infinite, or so large that differences are rounded.
                replaced = weight.index_copy(0, index, rows.to(weight.dtype)).to(ctx.dtype)
                dx = torch.mm(flat, replaced).view(*dy.shape[:-1], weight.shape[1]).to(ctx.dtype_of_x)
            if ctx.needs_input_grad[2]:
                d_rows = torch.mm(of_tokens.t(), x.reshape(-1, x.shape[-1]).to(ctx.dtype)).to(rows.dtype)
        return dx, None, d_rows, None, None
