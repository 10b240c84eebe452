"""What attention in linear memory makes, ours or PyTorch's own, without values: see common/shapes.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.shapes import imitated
from .gradients import Gradients, Needs
from .scores import Scores


def attention_shapes(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def gradient_shapes(q: Tensor, k: Tensor, v: Tensor, scores: Scores, needs: Needs) -> Gradients:
    """The gradients that are wanted; meanwhile, on a GPU, FlashAttention's sums of that of q in fp32."""
    sums = torch.empty_like(q, dtype=torch.float32) if imitated(q.device) == "cuda" else None
    inputs = (q, k, v, scores.relative, scores.bias, scores.sinks)
    grads = [torch.empty_like(t) if t is not None and need else None for t, need in zip(inputs, needs, strict=True)]
    del sums
    return Gradients(*grads)
