"""PyTorch's own fused attention, where it is asked for nothing that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..common.shapes import kind_of
from ..common.tracing import as_op
from .masks import Mask, dense_mask
from .scores import Scores

_FEW_QUERIES = 16
_MATH = 0  # of torch.nn.attention.SDPBackend: all scores in memory at once


def sdpa_refusal(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, deterministic: bool = False
) -> str | None:
    """Why `scaled_dot_product_attention` cannot give the same in linear memory; None when it can.

    The mask's bounds are `masks.bounded`.
    """
    for name in ("softcap", "relative", "sinks"):
        if getattr(scores, name) is not None:
            return f"expected no {name}, which it does not know"
    if scores.dropout > 0.0 and scores.seed is not None:
        return "expected no seed of the dropout, which it draws from torch's generator"
    if mask.start is not None:
        return "expected a mask without start and stop, which it would need as queries x keys"
    if mask.left is not None and mask.left < 0:
        return f"expected mask.left of 0 or more, got {mask.left}"
    bounded = mask.right is not None or (mask.left is not None and q.shape[2] > 1)
    if bounded + (mask.keys is not None) + (mask.dense is not None) + (scores.bias is not None) > 1:
        return "expected one of bounds, keys, dense and bias, whose sum it would need as queries x keys"
    if bounded and (mask.left is not None or mask.right != 0 or q.shape[2] != k.shape[2]):
        return "expected causal attention of as many queries as keys, or no bounds"
    if mask.left is not None and (mask.dense is not None or scores.bias is not None):
        return "expected no window with dense or bias"
    if scores.bias is not None:
        if scores.bias.dtype != q.dtype or kind_of(q.device) != "cpu":
            return f"expected a bias in q's {q.dtype} on a CPU, got {scores.bias.dtype} on {scores.bias.device}"
        if scores.bias.requires_grad and torch.is_grad_enabled():
            return "expected a bias without gradient, for which it keeps all scores"
    if deterministic and q.device.type == "cuda":
        return "expected deterministic=False: its gradients on a GPU are sums in any order"
    if q.shape[2] > _FEW_QUERIES and not _fused(q, k, v, mask, scores):
        return "expected sizes, strides and dtypes that one of its fused kernels takes"
    return None


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> Tensor:
    """As `api.attention` says, where `sdpa_refusal` gives None; differentiable."""
    out = sdpa_as_it_lies(q, k, v, mask, scores)
    return out if q.shape[2] == 1 else out.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_as_it_lies(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> Tensor:
    """The same in the layout that PyTorch's kernel gives it."""
    keys = mask.keys
    if mask.left is not None:  # of one query
        k, v = k[:, :, -mask.left - 1 :], v[:, :, -mask.left - 1 :]
        keys = None if keys is None else keys[:, -mask.left - 1 :]
    seen = mask.dense if keys is None else keys[:, None, None, :]
    some = None
    if seen is not None and q.device.type != "cpu":
        some, seen = never_empty(seen)
    grouped = {}
    if q.shape[1] != k.shape[1]:  # a branch, because a compiled comparison of sizes is no bool to it
        grouped = {"enable_gqa": True}
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_four(seen) if scores.bias is None else _four(scores.bias),
        dropout_p=scores.dropout,
        is_causal=mask.right is not None,
        scale=scores.scale,
        **grouped,
    )
    if some is not None:
        out = out.masked_fill(~some, 0.0)
    return out


def never_empty(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows see something, and the mask in which the others see all, for the caller to empty what they give: what
    a row gives that sees nothing depends on PyTorch's kernel."""
    some = seen.any(-1, keepdim=True)
    return some, seen | ~some


def dense_refusal(scores: Scores) -> str | None:
    """Why `attention_dense` cannot give the same, in memory that grows with queries x keys; None when it can."""
    for name in ("softcap", "sinks"):
        if getattr(scores, name) is not None:
            return f"expected no {name}, which it does not know"
    if scores.dropout > 0.0 and scores.seed is not None:
        return "expected no seed of the dropout, which it draws from torch's generator"
    return None


def attention_dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> Tensor:
    """As `api.attention` says, where `dense_refusal` gives None; differentiable, in what is added too."""
    queries, keys = q.shape[2], k.shape[2]
    seen = dense_mask(mask, queries, keys, q.device)
    added = [] if scores.bias is None else [scores.bias]
    if scores.relative is not None:  # each row begins one column before that of the query above
        added.append(scores.relative.unfold(1, keys, 1).flip(1))
    if not added:
        return attention_sdpa(q, k, v, Mask(dense=seen), Scores(scores.scale, dropout=scores.dropout))
    bias = sum(added[1:], added[0]).to(torch.promote_types(q.dtype, torch.float32))
    if seen is not None:
        bias = bias.masked_fill(~seen, -torch.inf)
    return attention_sdpa(q, k, v, Mask(), Scores(scores.scale, bias=bias, dropout=scores.dropout))


def attn_mask_of(mask: Mask, scores: Scores) -> Tensor | None:
    """Keys, dense mask or bias, of which there is one at most, with four dimensions, as PyTorch's own takes it."""
    seen = mask.dense if mask.keys is None else mask.keys[:, None, None, :]
    return _four(seen if scores.bias is None else scores.bias)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> bool:
    if as_op() or q.device.type not in ("cpu", "cuda"):
        same = q.shape[3] == v.shape[3] and q.shape[3] % 8 == 0 and q.shape[3] <= 256
        return same and q.stride(3) == k.stride(3) == v.stride(3) == 1
    chosen = torch._fused_sdp_choice(
        q,
        k,
        v,
        attn_mask_of(mask, scores),
        scores.dropout,
        mask.right is not None,
        scale=scores.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return bool(chosen != _MATH)


def _four(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view((1,) * (4 - x.dim()) + x.shape)
