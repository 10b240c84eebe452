"""LoRA on an embedding: the update of every token's row, added to the frozen row in the pass that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.device import autocast_off
from ..common.reshaping import reshaped
from ..common.validation import check_floating, check_instance, check_scaling
from .mixed_rows import rows_by_owner


def lora_embedding(
    y: Tensor, ids: Tensor, a: Tensor, b: Tensor, *, scaling: float | Tensor = 1.0, padding_idx: int | None = None
) -> Tensor:
    """The frozen embedding's output with one adapter's update added, in the wider of their dtypes.

    Equivalent PyTorch: `y + scaling * (F.embedding(ids, a.t(), padding_idx) @ b.t())`. Gradients reach y, a and b.
    Keeps ids and the rows of `a`, (tokens, rank), for backward; neither the update nor its scaled copy is made. The
    gradient of `a` is summed in fp32 at least: a frequent token's is a sum of thousands.

    Args:
        y: (..., features), the frozen embedding of ids.
        ids: (...), int64 or int32, on y's device; below vocabulary.
        a: (rank, vocabulary), floating.
        b: (features, rank), dtype of `a`.
        scaling: factor of the update; a float or a 0-d tensor on y's device, which is not trained.
        padding_idx: its row of `a` gets no gradient.

    Returns:
        A new tensor (..., features).

    Raises:
        TypeError: an argument that is no tensor, or of another kind of dtype.
        ValueError: sizes that do not fit.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685.
    """
    for name, tensor in (("y", y), ("a", a), ("b", b)):
        check_floating(name, tensor)
    check_instance("ids", ids, Tensor)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")
    if y.shape[:-1] != ids.shape or y.dim() < 1:
        raise ValueError(f"y: expected shape {(*ids.shape, 'features')}, got {tuple(y.shape)}")
    if a.dim() != 2 or b.shape != (y.shape[-1], a.shape[0]) or b.dtype != a.dtype:
        raise ValueError(
            f"b: expected shape {(y.shape[-1], 'rank')} and dtype of a, {tuple(a.shape)} {a.dtype}, "
            f"got {tuple(b.shape)} {b.dtype}"
        )
    check_scaling("scaling", scaling, y.device)
    return _LoraEmbedding.apply(y, ids, a, b, scaling, padding_idx)  # type: ignore[no-any-return]


def mixed_lora_embedding(
    y: Tensor,
    ids: Tensor,
    adapters: Mapping[int, tuple[Tensor, Tensor, float | Tensor]],
    adapter_index: tuple[int, ...],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """`lora_embedding` of a mixed batch, in which each row has an adapter of its own.

    Args:
        y: (rows, ..., features), the frozen embedding of ids (rows, ...).
        adapters: (a, b, scaling) of `lora_embedding` under each number.
        adapter_index: the number of each row's adapter; a row whose number no adapter has stays as it is.
        padding_idx: as of `lora_embedding`.

    Returns:
        A new tensor (rows, ..., features), in the widest dtype of y and the adapters that are used.

    Raises:
        TypeError, ValueError: as `lora_embedding`; another number of numbers than rows.
    """
    check_floating("y", y)
    if y.dim() < 2 or len(adapter_index) != y.shape[0]:
        raise ValueError(
            f"adapter_index: expected a number for each row of y (rows, ..., features), got {len(adapter_index)} "
            f"for y of shape {tuple(y.shape)}"
        )
    owners, rows, places = rows_by_owner(adapter_index, y.device)
    parts = []
    for owner, own in zip(owners, rows, strict=True):
        part = y.index_select(0, own)
        if owner in adapters:
            a, b, scaling = adapters[owner]
            part = lora_embedding(part, ids.index_select(0, own), a, b, scaling=scaling, padding_idx=padding_idx)
        parts.append(part)
    return torch.cat(parts).index_select(0, places) if parts else y.clone()


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: float | Tensor, padding_idx: int | None
    ) -> Tensor:
        ctx.options, ctx.dtype = (scaling, padding_idx, a.shape[1]), y.dtype
        s = F.embedding(ids.reshape(-1), a.t())
        factor = scaling if isinstance(scaling, Tensor) else None  # saved for torch to notice a write before backward
        ctx.save_for_backward(ids, s if ctx.needs_input_grad[3] else None, b, factor)
        rows = y.reshape(-1, y.shape[-1])
        wide = torch.promote_types(y.dtype, s.dtype)
        with autocast_off(y.device):
            return reshaped(torch.addmm(rows.to(wide), s.to(wide), (b.t() * scaling).to(wide)), y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        ids, s, b, _ = ctx.saved_tensors
        scaling, padding_idx, vocabulary = ctx.options
        rows, ids = dy.reshape(-1, dy.shape[-1]).to(b.dtype), ids.reshape(-1)
        da = db = None
        with autocast_off(dy.device):
            if ctx.needs_input_grad[2]:
                ds = torch.mm(rows, b).mul_(scaling)
                ds = ds.to(torch.promote_types(ds.dtype, torch.float32))
                padding = -1 if padding_idx is None else padding_idx
                da = torch.ops.aten.embedding_dense_backward(ds, ids, vocabulary, padding, False).t().to(b.dtype)
            if ctx.needs_input_grad[3]:
                db = torch.mm(rows.t(), s).mul_(scaling)
        return dy.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, da, db, None, None
