"""Which keys each query sees, without a matrix of queries x keys.

Every mask that transformers know by name is one interval of keys for each query, cut by padding: causal, sliding
window, packed documents, chunks, prefixes. So that is what the kernels know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A key is seen when every part that is given allows it; `Mask()` lets all be seen.

    Query i of `queries` has the position i + keys - queries: the last query stands at the last key ("bottom-right").

    Attributes:
        left, right: position - left <= key <= position + right; None for no bound. Causal is right=0, and with a window
            of w keys, the query's own among them, left=w-1.
        start, stop: int32 (batch or 1, queries), start <= key < stop; both or neither. Any values; where they do not
            decrease along the queries, blocks that nobody sees are skipped.
        keys: bool (batch or 1, keys), False for padding.
        dense: bool, broadcastable to (batch, heads, queries, keys): what nothing else describes. Its memory grows with
            queries x keys.
    """

    left: int | None = None
    right: int | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    keys: Tensor | None = None
    dense: Tensor | None = None


def bounded(mask: Mask, queries: int, keys: int) -> Mask:
    """The same without bounds that no query meets."""
    left = None if mask.left is None or mask.left >= keys - 1 else mask.left
    right = None if mask.right is None or mask.right >= queries - 1 else mask.right
    if left is mask.left and right is mask.right:
        return mask
    return Mask(left, right, mask.start, mask.stop, mask.keys, mask.dense)  # `replace` takes ten times as long


def dense_mask(mask: Mask, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The same as a bool tensor, broadcastable to (batch, heads, queries, keys); None where all is seen."""
    key = torch.arange(keys, device=device)
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    parts = []
    if mask.left is not None:
        parts.append(key >= position - mask.left)
    if mask.right is not None:
        parts.append(key <= position + mask.right)
    if mask.start is not None and mask.stop is not None:
        parts.append(((key >= mask.start[..., None]) & (key < mask.stop[..., None]))[:, None])
    if mask.keys is not None:
        parts.append(mask.keys[:, None, None, :])
    if mask.dense is not None:
        parts.append(mask.dense)
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen
