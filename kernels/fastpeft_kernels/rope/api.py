"""Rotary position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.device import autocast_off, triton_available, triton_serves
from ..common.tracing import as_op
from ..common.validation import check_device, check_floating
from .autograd import apply
from .reference import rotary_reference
from .rotation import ANGLES, LAYOUTS, Rotation

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: str = "halved",
    angles: str = "each",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Any]:
    """q and k, each pair of elements turned by its token's angle; in one pass for both; differentiable once.

    Equivalent PyTorch, for the defaults and with `rotate_half(x) = cat([-x[..., d // 2 :], x[..., : d // 2]], -1)`:
    `q * cos + rotate_half(q) * sin`, cos and sin unsqueezed at dimension 1; likewise k. That is what serves where our
    kernel does not, and under torch.compile, selective checkpointing and with fake tensors. The kernel computes in fp32
    and rounds once, whatever autocast says. Backward reads cos and sin and nothing else. Deterministic.

    Args:
        q: (batch, heads, tokens, dim) in fp32, fp16, bf16 or fp64, of any strides; not written to.
        k: (batch, its heads, tokens, dim), of the same dtype; None where q is turned alone.
        cos, sin: (batch or 1, tokens, turned), floating, `turned` even and at most dim; elements from there on are
            copied. They get no gradient.
        layout: which elements are turned together: "halved", i and i + turned / 2 (Llama, GPT-NeoX); "interleaved",
            2 i and 2 i + 1 (GPT-J, Cohere, GLM); "separated", these too, but what comes of them stands at i and
            i + turned / 2 (DeepSeek V3).
        angles: "each": cos[..., i] belongs to the result's element i; "pairs": its first half has one value for each
            pair, in order (GLM, DeepSeek V3), and the second is not read; "half": cos and sin are
            (batch or 1, tokens, turned / 2) and have one value for each pair, in order (gpt-oss, GPT-J).
        dtype: of the results; that of a product of q and cos by default.
        backend: "torch", "triton" (on CUDA, not in fp64), or "auto".

    Returns:
        (q, k), turned, None for None: new tensors, dense, their dimensions in the order in which those of q and k lie
        in memory.

    Raises:
        TypeError: a tensor is not one, or not floating.
        ValueError: any other argument is not as above, or the backend that was asked for cannot serve here.
        ImportError: backend "triton" without Triton.

    Source: RoFormer, Su et al. 2021, arXiv:2104.09864.
    """
    _check(q, k, cos, sin, 1 if angles == "half" else 2)
    for name, value, known in (("layout", layout, LAYOUTS), ("angles", angles, ANGLES), ("backend", backend, BACKENDS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating dtype or None, got {dtype!r}")
    if backend == "triton":
        if not triton_available():
            raise ImportError("backend: 'triton' was asked for, but Triton is not installed")
        if any(x.dtype not in DTYPES for x in (q, cos, sin)):
            raise ValueError(f"backend: 'triton' was asked for, which takes fp32, fp16 and bf16, got {q.dtype}")
    out = dtype or torch.promote_types(q.dtype, cos.dtype)
    return run_rotary(q, k, cos, sin, Rotation(layout, angles, out), backend)


def run_rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotation: Rotation, backend: str = "auto"
) -> tuple[Tensor, Any]:
    """The same for callers that have checked their arguments. In no `torch.func` transform."""
    if backend == "auto":
        backend = "triton" if kernel_serves(q, cos) else "torch"
    if backend == "torch":
        with autocast_off(q.device):
            return rotary_reference(q, k, cos, sin, rotation)
    return apply(q, k, cos, sin, rotation)


def kernel_serves(q: Tensor, cos: Tensor) -> bool:
    """Whether our kernel can serve such tensors at present."""
    return q.dtype in DTYPES and cos.dtype in DTYPES and triton_serves(q.device) and not as_op()


def _check(q: Any, k: Any, cos: Any, sin: Any, multiple: int) -> None:
    k = q if k is None else k
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_floating(name, x)
        check_device(name, x.device, q.device)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, tokens, dim), got shape {tuple(x.shape)}")
    batch, _, tokens, dim = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, tokens, dim) or k.dtype != q.dtype:
        raise ValueError(
            f"k: expected batch, tokens, dim and dtype of q, {(batch, tokens, dim)} and {q.dtype}, "
            f"got shape {tuple(k.shape)} and {k.dtype}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 3 and table.shape[0] in (1, batch) and table.shape[1] == tokens
        features, most = table.shape[-1] if table.dim() else 0, dim * multiple // 2
        if not fits or features % multiple or not features or features > most or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected ({batch} or 1, {tokens}, {'an even number' if multiple == 2 else 'a number'} up to "
                f"{most}) for both of cos and sin, got shape {tuple(table.shape)}"
            )
        if table.dtype != cos.dtype:
            raise ValueError(f"{name}: expected the dtype of cos, {cos.dtype}, got {table.dtype}")
        if table.requires_grad:
            raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does")
