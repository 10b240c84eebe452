"""Attention in plain PyTorch: the definition, differentiable in any dtype, and the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.random import dropout_bits, keep_threshold
from .masks import Mask, dense_mask
from .scores import Scores


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> tuple[Tensor, Tensor]:
    """softmax(scores) v, all scores in memory at once.

    Args:
        q: (batch, heads, queries, features).
        k: (batch, kv_heads, keys, features); heads is a multiple of kv_heads, head h reads h // (heads // kv_heads).
        v: (batch, kv_heads, keys, v_features).
        mask, scores: which keys are seen, and what is done to the scores.

    Returns:
        (batch, heads, queries, v_features) in q's dtype, and the natural logarithm of the sum of the exponentials,
        sinks among them, (batch, heads, queries) in fp32 or fp64. A query that sees no key gives zeros, and passes no
        gradient on; its logarithm is -inf, or its sink.

    16-bit inputs are multiplied in 16 bits, and their softmax is in fp32, as transformers' eager attention does.
    """
    batch, heads, queries, _ = q.shape
    groups, keys = heads // k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    score = q @ k.repeat_interleave(groups, dim=1).transpose(-1, -2) * scores.scale
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    if scores.relative is not None:
        score = score + _by_distance(scores.relative, queries, keys)
    if scores.bias is not None:
        score = score + scores.bias
    score = score.to(wide)
    seen = dense_mask(mask, queries, keys, q.device)
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    if scores.sinks is not None:
        sink = scores.sinks.to(wide)[None, :, None, None].expand(batch, heads, queries, 1)
        score = torch.cat([score, sink], dim=-1)
    lse = torch.logsumexp(score, dim=-1)
    weights = torch.exp(score - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., :keys]
    weights = _dropped(weights, scores).to(q.dtype)
    return weights @ v.repeat_interleave(groups, dim=1), lse


def _by_distance(relative: Tensor, queries: int, keys: int) -> Tensor:
    """(heads, queries, keys) of (heads, queries + keys - 1)."""
    query, key = torch.arange(queries, device=relative.device), torch.arange(keys, device=relative.device)
    return relative[:, key - query[:, None] + queries - 1]


def _dropped(weights: Tensor, scores: Scores) -> Tensor:
    if scores.dropout == 0.0:
        return weights
    assert scores.seed is not None
    batch, heads, queries, keys = weights.shape
    streams = torch.arange(batch * heads, device=weights.device).view(batch, heads)
    kept = dropout_bits(scores.seed, 0, queries, keys, streams) >= keep_threshold(scores.dropout)
    return torch.where(kept, weights / (1.0 - scores.dropout), 0.0)
