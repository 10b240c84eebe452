"""What attention in linear memory makes, ours or PyTorch's own, without values: see common/shapes.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.shapes import empty_for, imitated
from .gradients import Gradients, Needs
from .scores import Scores


def attention_shapes(q: Tensor, v: Tensor, library: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse); PyTorch's own, the library's, lays its result out as q."""
    batch, heads, queries, features = q.shape
    if library and v.shape[3] == features:
        out = torch.empty_like(q)
    else:
        out = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def added_shapes(q: Tensor, dense: Tensor) -> tuple[Tensor, Tensor | None]:
    """What PyTorch's own makes of a mask of queries x keys: 0 or -infinity in q's dtype, which backward reads; and on a
    GPU our copy of the mask, in which no row is empty, until attention is done."""
    added = torch.empty(dense.shape, dtype=q.dtype, device=q.device)
    return added, torch.empty_like(added, dtype=torch.bool) if imitated(q.device) == "cuda" else None


def gradient_shapes(q: Tensor, k: Tensor, v: Tensor, scores: Scores, needs: Needs) -> Gradients:
    """The gradients that are wanted; meanwhile, on a GPU, what FlashAttention 2 and cuDNN take beside them.

    That is the sums of q's gradient in fp32, and, where query heads share keys and values, the gradients of k and v by
    query head. (On an H200 cuDNN asks for 3.68 GiB at once for 120,000 tokens of 32 heads of 128 over 8, in bf16: these
    3.66 and 4 bytes a row of scores.)
    """
    beside = []
    if imitated(q.device) == "cuda":
        sizes: list[tuple[tuple[int, ...], torch.dtype]] = [(tuple(q.shape), torch.float32)]
        if q.shape[1] != k.shape[1]:
            sizes += [((q.shape[0], q.shape[1], *t.shape[2:]), t.dtype) for t in (k, v)]
        beside = [empty_for("attention", shape, dtype, q.device) for shape, dtype in sizes]
    inputs = (q, k, v, scores.relative, scores.bias, scores.sinks)
    grads = [torch.empty_like(t) if t is not None and need else None for t, need in zip(inputs, needs, strict=True)]
    del beside
    return Gradients(*grads)
