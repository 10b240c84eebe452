"""A step of generation: one query a row, without gradients, by PyTorch's own attention.

By itself, because to look at a call's arguments as `attention` does takes as long as this.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastpeft_kernels.attention.library import never_empty
from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.common.remembered import Remembered

_not_empty = Remembered(never_empty)


def one_query(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, scaling: float | None
) -> Tensor | None:
    """What `attention_forward` returns of a call that drops nothing, or None if it is another one.

    Args:
        query: (batch, heads, 1, features).
        key, value: (batch, kv_heads, keys, features) and (..., v_features).
        mask: bool (batch, 1 or heads, 1, keys).
        bias: (1, heads, 1, keys), T5's of one query, which is a row.
        scaling: 1 / sqrt(features) by default.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if query.is_meta or key.numel() == 0 or query.numel() == 0 or value.numel() == 0:
        return None
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != (1, key.shape[2])):
        return None
    if bias is not None and (bias.shape[2:] != (1, key.shape[2]) or (bias.requires_grad and torch.is_grad_enabled())):
        return None
    dtype = autocast_dtype(query.device)
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    some = None
    if bias is not None:
        bias = bias.to(query.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    elif mask is not None and query.device.type != "cpu":
        some, mask = _not_empty(mask)
    grouped = {} if query.shape[1] == key.shape[1] else {"enable_gqa": True}
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, **grouped)
    if some is not None:
        out = out.masked_fill(~some, 0.0)
    return out.transpose(1, 2).contiguous()
