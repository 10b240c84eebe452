"""Who computes attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import product_dtype, triton_available, triton_serves
from ..common.shapes import imitated, kind_of
from ..common.tracing import as_op
from ..tuning.choosing import choice, gathers
from . import library_cpu
from .blocks import CPU
from .candidates import registry
from .candidates.request import Request
from .keys import MASKED, OP, key_of, masked_key_of
from .library import dense_refusal, sdpa_refusal
from .masks import Mask
from .scores import Scores

_TINY = 1 << 17  # scores of the whole call: half a megabyte
_FEW_SCORES = 1 << 26  # a quarter of a gigabyte in fp32
_FEW_FOR_LAUNCHES = 1 << 23
"""Scores, by arithmetic and not measured: 32 heads of 512 tokens take an H200 some 20 us, four launches of ours forward
and backward the host ten times as long, a mask of queries x keys and PyTorch's own less than half of that."""
_FEW_SEEN = 1 << 28  # of a mask's elements, a byte each
_FEW_SEEN_ON_CPU = CPU.scores  # no more memory than a block's
"""Measured on an EPYC, one thread, fp32, causal with padding, 8 heads of 64, forward and backward, in ms, dense and in
blocks: 4 rows of 256 tokens 36 and 61, of 512 137 and 177, 2 of 1024 289 and 290."""
_FEW_DROPPED = 1 << 24
"""Scores of a call, 64 MiB in fp32, that a CPU keeps where it drops some of them: in blocks they are made twice.
Measured as above with dropout, dense and in blocks: 2 rows of 256 tokens of 12 heads 64 and 108, in bf16 66 and 115."""


def backend_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, with_lse: bool, deterministic: bool) -> str:
    """The backend that "auto" stands for; "auto" itself is the one of ours that serves, asked for when it computes.

    "dense" is PyTorch's own with the mask, and what is added, as queries x keys, as models do it: where that is little,
    and on a GPU that our kernels do not serve. Under torch.compile only sizes and settings are looked at.
    """
    if 0 in (q.numel(), k.numel(), v.numel()):
        return "reference"
    count = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    few_dropped = scores.dropout > 0.0 and count <= _FEW_DROPPED and kind_of(q.device) == "cpu"
    if few_dropped and not with_lse and not as_op() and dense_refusal(scores) is None:
        return "dense"
    if (kind := imitated(q.device)) is not None:
        tiny = kind == "cpu" and count <= _TINY
        refused = scores.dropout > 0.0 or sdpa_refusal(q, k, v, mask, scores, deterministic) is not None
        return "reference" if tiny and refused else "auto"
    slow = _slow_in_16_bits(q)
    if with_lse or sdpa_refusal(q, k, v, mask, scores, deterministic) is not None:
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
    return _serving(found, default, Request(q, k, v, mask, scores, with_lse, deterministic))


def _serving(found: str, default: str, request: Request) -> str:
    """The backend that was chosen, where it serves this very call; else the default."""
    name = registry.named(found)
    if name == "triton":
        return default if triton_refusal(*request[:5]) is not None else name
    return default if name in registry.CANDIDATES and registry.refusal(name, request) is not None else name


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
        if few and not gathers() and _serves_dense(q, k, v, scores, deterministic):
            return "dense"
        request = Request(q, k, v, mask, scores, with_lse, deterministic)
        key = None if with_lse else masked_key_of(q, k, v, mask, scores, request.gradients)
        if key is None:
            return "auto"
        return _serving(choice(MASKED, q.device, lambda: key, masked_backends, "auto"), "auto", request)
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


def attention_backends(device: torch.device) -> Sequence[str]:
    """All that can be chosen on a device where PyTorch's own serves, that first."""
    if device.type != "cuda":
        return ("sdpa", "blockwise")
    return ("sdpa", "triton" if triton_serves(device) else "blockwise", *registry.labels(device))


def masked_backends(device: torch.device) -> Sequence[str]:
    """All that can be chosen on a device where PyTorch's own does not serve, ours first."""
    if device.type != "cuda":
        return ("blockwise",)
    return ("triton" if triton_serves(device) else "blockwise", *registry.labels(device, beyond_sdpa=True))


def own_backend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> str:
    """The one of our implementations that serves; "cpu" is `library_cpu`."""
    if triton_serves(q.device) and triton_refusal(q, k, v, mask, scores) is None:
        return "triton"
    return "cpu" if library_cpu.serves(q, k, v, mask, scores) else "blockwise"


def triton_refusal(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> str | None:
    """Why our Triton kernels cannot serve; None when they can."""
    if not triton_available():
        return "Triton cannot be imported here"
    from .refusal import triton_refusal as refusal

    return refusal(q, k, v, mask, scores)
