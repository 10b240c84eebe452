"""Cases of the two choices: attention that PyTorch's own could serve, and that which only others can."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..tuning.keys import CHECKED_TOKENS, bucket, dtype_name
from .masks import Mask
from .scores import Scores

OP = "attention"
MASKED = "attention_masked"


class AttentionKey(NamedTuple):
    """A call that PyTorch's own attention could serve. Queries and keys are rounded up to powers of two."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    features: int
    mask: str
    gradients: bool
    dtype: str

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}({self.kv_heads})x{self.queries}x{self.keys}x{self.features}"
        return f"{sizes}, {self.mask}, {self.dtype}{', with gradients' if self.gradients else ''}"

    def at(self, tokens: int, device: torch.device) -> AttentionKey:
        """So many tokens in sequences of as many queries and keys as before, no longer than the tokens are many."""
        return _at(self, tokens)

    def smaller(self) -> AttentionKey:
        return _smaller(self)


class MaskedKey(NamedTuple):
    """A call that it could not serve without queries x keys, because of its mask, soft cap or sinks.

    Attributes:
        left, right: how many keys are seen on that side of the query's position, that one among them, rounded up to
            powers of two: causal is right=1; -1 for no bound.
        intervals, marks: whether the mask has start and stop, and keys.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    features: int
    v_features: int
    left: int
    right: int
    intervals: bool
    marks: bool
    softcap: bool
    sinks: bool
    gradients: bool
    dtype: str

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.heads}({self.kv_heads})x{self.queries}x{self.keys}x{self.features}"
        bounds = [f"{name} {size}" for name, size in (("left", self.left), ("right", self.right)) if size >= 0]
        parts = [name for name in ("intervals", "marks", "softcap", "sinks", "gradients") if getattr(self, name)]
        return ", ".join([sizes, *bounds, *parts, self.dtype])

    def at(self, tokens: int, device: torch.device) -> MaskedKey:
        """As `AttentionKey.at`."""
        return _at(self, tokens)

    def smaller(self) -> MaskedKey:
        return _smaller(self)


_Key = TypeVar("_Key", AttentionKey, MaskedKey)


def key_of(q: Tensor, k: Tensor, mask: Mask, scores: Scores, gradients: bool) -> AttentionKey:
    """The case of a call."""
    batch, heads, queries, features = q.shape
    kind = "causal" if mask.right is not None else "keys" if mask.keys is not None else "all"
    kind = "dense" if mask.dense is not None or scores.bias is not None else kind
    sizes = (bucket(queries), bucket(k.shape[2]), features)
    return AttentionKey(batch, heads, k.shape[1], *sizes, kind, gradients, dtype_name(q.dtype))


def masked_key_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, gradients: bool) -> MaskedKey | None:
    """The case of a call; None where only ours serve whatever was measured."""
    if scores.relative is not None or scores.bias is not None or scores.dropout > 0.0 or mask.dense is not None:
        return None
    if (mask.left or 0) < 0 or (mask.right or 0) < 0:
        return None
    batch, heads, queries, features = q.shape
    left, right = (-1 if bound is None else bucket(bound + 1) for bound in (mask.left, mask.right))
    parts = (mask.start is not None, mask.keys is not None, scores.softcap is not None, scores.sinks is not None)
    sizes = (bucket(queries), bucket(k.shape[2]), features, v.shape[3])
    return MaskedKey(batch, heads, k.shape[1], *sizes, left, right, *parts, gradients, dtype_name(q.dtype))


def _at(key: _Key, tokens: int) -> _Key:
    queries, keys = min(key.queries, bucket(tokens)), min(key.keys, bucket(tokens))
    return key._replace(batch=max(1, bucket(tokens) // queries), queries=queries, keys=keys)


def _smaller(key: _Key) -> _Key:
    return key._replace(batch=1, queries=min(key.queries, CHECKED_TOKENS), keys=min(key.keys, CHECKED_TOKENS))
