"""Products grouped by expert, and a layer's experts, each as one differentiable operation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.validation import FLOATING, check_instance
from . import autograd
from .products import uses_loop
from .routing import Pairs, Routes
from .structure import ExpertProjection, Experts
from .validation import INTEGERS, check_experts, check_matrix, check_projection


def grouped_lora_linear(
    x: Tensor,
    counts: Tensor,
    projection: ExpertProjection,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x W_e^T + bias_e + sum over adapters of scaling * (x A_e^T) B_e^T, for rows of expert e.

    Equivalent PyTorch: `reference.grouped_lora_linear_reference`. Gradients reach x and every adapter's a and b, where
    they require them; the frozen weights never get one. No matrix of all experts is made beside those of rank width.

    Args:
        x: (rows, in_features), floating, sorted by expert.
        counts: (experts,), int64 or int32 on x's device: how many rows each expert has; they add up to `rows`.
        projection: `ExpertProjection`.
        dtype: of products and result, default x's. On CPUs without instructions for 16-bit products they are made in
            fp32 and rounded once.
        backend: "loop" over the experts that got rows, any dtype; "grouped_mm", torch's grouped product, in bf16 on
            GPUs of compute capability 8.0 and later, over weights that lie ready, all sizes and the sum of ranks in
            multiples of 16 bytes; or "auto": that where it serves on a GPU, else the loop.

    Returns:
        A new tensor (rows, out_features) in `dtype`.

    Raises:
        TypeError: an argument that is no tensor, not floating, or adapters of differing dtypes.
        ValueError: sizes or devices that do not fit; a backend that was asked for cannot serve.
        RuntimeError: in backward, when a frozen weight was changed or moved since forward.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; products grouped by expert: MegaBlocks, Gale et al. 2022,
    arXiv:2211.15841.
    """
    check_instance("projection", projection, ExpertProjection)
    check_instance("x", x, Tensor)
    check_projection(projection, "projection", x.device)
    check_matrix(x, "x", projection.in_features)
    check_instance("counts", counts, Tensor)
    if counts.dtype not in INTEGERS:
        raise TypeError(f"counts: expected a dtype of {INTEGERS}, got {counts.dtype}")
    if tuple(counts.shape) != (projection.experts,) or counts.device != x.device:
        raise ValueError(
            f"counts: expected ({projection.experts},) on {x.device}, got {tuple(counts.shape)} on {counts.device}"
        )
    if int(counts.min()) < 0 or int(counts.sum()) != x.shape[0]:
        raise ValueError(
            f"counts: expected numbers from 0 that add up to {x.shape[0]}, got a sum of {int(counts.sum())}"
        )
    dtype = _dtype(dtype, x)
    routes = Routes.of_counts(counts, x.shape[0], loop=uses_loop(backend, [projection], dtype))
    y: Tensor = autograd.GroupedLoraLinear.apply(routes, projection, dtype, x, *projection.tensors())
    return y


def lora_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: Experts,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """A mixture's routed experts: for each token the sum over its choices of weight * down_e(gating(inner_e(x))).

    Equivalent PyTorch: `reference.lora_experts_reference`. Gradients reach x, the weights, and every adapter's a and b,
    where they require them; the frozen weights never get one. Rows are sorted by expert; kept for backward are x, what
    the inner projection gave, and matrices of rank width. Deterministic.

    Args:
        x: (tokens, in_features), floating.
        index: (tokens, top_k), int64 or int32: the experts of each token, which may be one twice.
        weights: (tokens, top_k), floating: their weights.
        experts: `Experts`.
        dtype, backend: as of `grouped_lora_linear`, for both projections.

    Returns:
        A new tensor (tokens, in_features) in x's dtype; summed in the larger of `dtype` and that of the weights.

    Raises:
        TypeError, ValueError, RuntimeError: as `grouped_lora_linear`; and, of the loop, for an expert in `index` that
            there is not.

    Source: as `grouped_lora_linear`.
    """
    check_experts(x, index, weights, experts)
    return run_experts(x, index, weights, experts, _dtype(dtype, x), backend)


def run_experts(
    x: Tensor, index: Tensor, weights: Tensor, experts: Experts, dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """`lora_experts` for callers that have checked their arguments."""
    pairs = Pairs.of_index(index, experts.inner.experts, loop=uses_loop(backend, experts.projections, dtype))
    return autograd.apply(x, pairs, weights, experts, dtype)


def _dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype: expected one of {FLOATING}, got {dtype!r}")
    return x.dtype if dtype is None else dtype
