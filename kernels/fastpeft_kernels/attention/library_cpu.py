"""PyTorch's fused attention of a CPU as one of our own implementations: it gives the logarithms of the sums, too.

For masks whose ranges turn out to be no more than causal attention when they have values. A graph of torch.compile has
such ranges wherever positions may go back to 0, since it is made before it is known that they don't.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import product_dtype
from .gradients import Gradients, Needs
from .masks import Mask
from .scores import Scores


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> bool:
    """Whether it gives the same. Looks at the values of the ranges."""
    if q.device.type != "cpu" or 0 in (q.numel(), k.numel()) or product_dtype(q.dtype, q.device) != q.dtype:
        return False
    if q.shape[3] != v.shape[3] or q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        return False
    changed = (scores.softcap, scores.relative, scores.bias, scores.sinks, mask.keys, mask.dense, mask.left)
    if any(x is not None for x in changed) or scores.dropout > 0.0:
        return False
    return is_causal(mask, q.shape[2], k.shape[2])


def is_causal(mask: Mask, queries: int, keys: int) -> bool:
    """Whether `right` and the ranges say that each of as many queries as keys sees the keys up to its own."""
    if queries != keys or mask.right not in (None, 0):
        return False
    if mask.start is None or mask.stop is None:
        return mask.right == 0
    ends = torch.arange(1, keys + 1, dtype=mask.stop.dtype)
    stops = mask.stop == ends if mask.right is None else mask.stop >= ends
    return not bool((mask.start > 0).any()) and bool(stops.all())


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """(out, lse) of causal attention, as `api.attention` says; without a gradient."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scores.scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def attention_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: Scores, needs: Needs
) -> Gradients:
    """The gradients that are wanted, from what `attention_cpu` took and gave."""
    function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = function(dout, q, k, v, out, lse, 0.0, True, scale=scores.scale)
    return Gradients(*(grad if need else None for grad, need in zip(found, needs[:3], strict=True)))
