"""Who computes attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import product_dtype, triton_available, triton_serves
from ..common.tracing import as_op
from ..tuning.choosing import choice
from ..tuning.keys import bucket, dtype_name
from .blocks import CPU
from .library import sdpa_refusal
from .masks import Mask
from .scores import Scores

OP = "attention"
_TINY = 1 << 17  # scores of the whole call: half a megabyte
_FEW_SCORES = 1 << 26  # a quarter of a gigabyte in fp32
_FEW_FOR_LAUNCHES = 1 << 23
"""Scores, by arithmetic and not measured: 32 heads of 512 tokens take an H200 some 20 us, four launches of ours forward
and backward the host ten times as long, a mask of queries x keys and PyTorch's own less than half of that."""
_FEW_SEEN = 1 << 28  # of a mask's elements, a byte each
_FEW_SEEN_ON_CPU = CPU.scores  # no more memory than a block's
"""Measured on an EPYC, one thread, fp32, causal with padding, 8 heads of 64, forward and backward, in ms, dense and in
blocks: 4 rows of 256 tokens 36 and 61, of 512 137 and 177, 2 of 1024 289 and 290."""


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
        queries, keys = min(self.queries, bucket(tokens)), min(self.keys, bucket(tokens))
        return self._replace(batch=max(1, bucket(tokens) // queries), queries=queries, keys=keys)

    def smaller(self) -> AttentionKey:
        return self._replace(batch=1, queries=min(self.queries, 512), keys=min(self.keys, 512))


def backend_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, with_lse: bool, deterministic: bool) -> str:
    """The backend that "auto" stands for; "auto" itself is the one of ours that serves, asked for when it computes.

    "dense" is PyTorch's own with the mask as queries x keys, as models do it: where that is little, and on a GPU that
    our kernels do not serve. Under torch.compile only sizes and settings are looked at.
    """
    if 0 in (q.numel(), k.numel(), v.numel()):
        return "reference"
    slow = _slow_in_16_bits(q)
    if with_lse or sdpa_refusal(q, k, v, mask, scores, deterministic) is not None:
        count = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if q.device.type == "cuda":
            return _on_a_gpu(q, k, v, mask, scores, with_lse, deterministic, count)
        if q.device.type != "cpu" or slow or as_op():
            return "auto"
        if count <= _TINY:
            return "reference"
        few = count // q.shape[1] <= _FEW_SEEN_ON_CPU and not with_lse
        return "dense" if few and _serves_dense(q, k, v, scores, deterministic) else "auto"
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    default = "auto" if slow and gradients else "sdpa"
    if as_op() or q.dtype == torch.float64:
        return default
    found = choice(OP, q.device, lambda: key_of(q, k, mask, scores, gradients), attention_backends, default)
    return default if found == "triton" and triton_refusal(q, k, v, mask, scores) is not None else found


def _on_a_gpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, with_lse: bool, deterministic: bool, count: int
) -> str:
    """What serves a GPU where PyTorch's own does not in linear memory.

    Our kernels, but where there is so little to do that their launches would take the host longer; where they do not
    serve, not blocks, which are many launches, unless there is much.
    """
    if as_op():
        return "auto"
    if own_backend(q, k, v, mask, scores) == "triton":
        few = count <= _FEW_FOR_LAUNCHES and not with_lse
        return "dense" if few and _serves_dense(q, k, v, scores, deterministic) else "auto"
    if count // q.shape[1] <= _FEW_SEEN and not with_lse and _serves_dense(q, k, v, scores, deterministic):
        return "dense"
    return "reference" if count <= _FEW_SCORES else "auto"


def _serves_dense(q: Tensor, k: Tensor, v: Tensor, scores: Scores, deterministic: bool) -> bool:
    """Whether PyTorch's own takes a mask of queries x keys, whatever it says."""
    like = torch.ones((), dtype=torch.bool, device=q.device).expand(q.shape[0], 1, q.shape[2], k.shape[2])
    return sdpa_refusal(q, k, v, Mask(dense=like), scores, deterministic) is None


def _slow_in_16_bits(q: Tensor) -> bool:
    """Whether the CPU multiplies 16-bit numbers in loops, where ours are fp32; under torch.compile taken to."""
    if as_op():
        return q.device.type == "cpu" and q.dtype.itemsize == 2
    return product_dtype(q.dtype, q.device) != q.dtype


def key_of(q: Tensor, k: Tensor, mask: Mask, scores: Scores, gradients: bool) -> AttentionKey:
    """The case of a call."""
    batch, heads, queries, features = q.shape
    kind = "causal" if mask.right is not None else "keys" if mask.keys is not None else "all"
    kind = "dense" if mask.dense is not None or scores.bias is not None else kind
    sizes = (bucket(queries), bucket(k.shape[2]), features)
    return AttentionKey(batch, heads, k.shape[1], *sizes, kind, gradients, dtype_name(q.dtype))


def attention_backends(device: torch.device) -> Sequence[str]:
    """All that can be chosen on a device, PyTorch's own first."""
    return ("sdpa", "triton") if triton_serves(device) else ("sdpa", "blockwise")


def own_backend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> str:
    """The one of our implementations that serves."""
    if triton_serves(q.device) and triton_refusal(q, k, v, mask, scores) is None:
        return "triton"
    return "blockwise"


def triton_refusal(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> str | None:
    """Why our Triton kernels cannot serve; None when they can."""
    if not triton_available():
        return "Triton cannot be imported here"
    from .refusal import triton_refusal as refusal

    return refusal(q, k, v, mask, scores)
