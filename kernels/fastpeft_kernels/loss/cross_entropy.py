"""Cross-entropy of given logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.device import autocast_off
from ..common.validation import check_floating
from . import statistics_op
from .backends import check_backend
from .combining import reduced, token_losses
from .head import Options
from .rows import as_rows
from .validation import check_labels, check_options, check_range, check_reduction, check_weights

FEW_ON_CPU = 1 << 22
"""Logits up to which PyTorch's own operation takes no more time on a CPU than ours; it makes at most 48 MB in fp32."""


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the labels under softmax of the logits, which are read once forward and once backward.

    Equivalent PyTorch: `F.cross_entropy(logits.float(), labels)`; see `Options` and `loss.reference`. Computed in fp32
    (fp64 in fp64). Nothing of the logits' size is made but their gradient, in their dtype; the logits are not written
    to. Deterministic. Where the logits come from a head, `linear_cross_entropy` makes none at all. On a CPU up to
    `FEW_ON_CPU` logits without z-loss are PyTorch's own operation, which passes NaN on to an ignored row that holds
    one; else its gradient is zero.

    Args:
        logits: (..., words), floating.
        labels: (...) int64, each in [0, words) or `ignore_index`, of the logits beside it: nothing is shifted.
        reduction, num_items, ignore_index, label_smoothing, z_loss, class_weight, token_weight: as for
            `linear_cross_entropy`.
        backend: "torch"; "triton" (fp32, fp16 and bf16 on CUDA); or "auto": triton where it serves, PyTorch's own
            operation for few logits on a CPU, else torch.

    Returns:
        0-d, or (...) for reduction "none"; fp32 (fp64 in fp64). Differentiable, once but by PyTorch's own
            operation, in logits and token_weight.

    Raises:
        TypeError, ValueError: an argument is not as above. Labels outside [0, words) are found on a CPU alone; on a GPU
            their loss is infinite.
        ImportError: backend "triton" without Triton.

    Source: Online normalizer calculation for softmax, Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    check_floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape (..., words) with words >= 1, got {tuple(logits.shape)}")
    check_labels(labels, logits, logits.shape[-1], ignore_index, in_range=False)
    options = Options(ignore_index, label_smoothing, z_loss)
    check_options(options)
    check_weights(class_weight, token_weight, labels, logits.shape[-1])
    check_reduction(reduction, num_items)
    check_backend(backend, logits=logits)
    flat = labels.reshape(-1)
    if backend == "auto" and not z_loss and logits.device.type == "cpu" and logits.numel() <= FEW_ON_CPU:
        loss = _plain(as_rows(logits), flat, options, reduction, num_items, class_weight, token_weight)
        return loss.view(labels.shape) if reduction == "none" else loss
    check_range(labels, logits.shape[-1], ignore_index)
    counted = flat != ignore_index
    safe = torch.where(counted, flat, 0)
    nll, lse, total = statistics_op.apply(
        as_rows(logits), flat, ignore_index, class_weight, label_smoothing > 0, backend
    )
    losses = token_losses(nll, lse, total, options, class_weight, safe, logits.shape[-1])
    losses = torch.where(counted, losses, 0.0)
    if token_weight is not None:
        losses = losses * token_weight.reshape(-1)
    loss = reduced(losses, safe, counted, reduction, num_items, class_weight)
    return loss.view(labels.shape) if reduction == "none" else loss


def _plain(
    rows: Tensor,
    labels: Tensor,
    options: Options,
    reduction: str,
    num_items: int | Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
) -> Tensor:
    """By PyTorch's own operation, of (tokens, words) and (tokens,)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    weight = None if class_weight is None else class_weight.to(wide)
    wanted = reduction if token_weight is None and num_items is None else "none"
    try:
        with autocast_off(rows.device):
            losses = F.cross_entropy(
                rows.to(wide), labels, weight, None, options.ignore_index, None, wanted, options.label_smoothing
            )
    except IndexError:  # a label outside is found here, without another pass over them
        check_range(labels, rows.shape[1], options.ignore_index)
        raise
    if wanted != "none":
        return losses
    if token_weight is not None:
        losses = losses * token_weight.reshape(-1)
    counted = labels != options.ignore_index
    return reduced(losses, torch.where(counted, labels, 0), counted, reduction, num_items, class_weight)
