"""From what is known of each token to the loss: the formula in `head.Options`, and the reductions."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import Options


def token_losses(
    nll: Tensor,
    lse: Tensor,
    total: Tensor | None,
    options: Options,
    class_weight: Tensor | None,
    labels: Tensor,
    words: int,
) -> Tensor:
    """(tokens,), differentiable in nll, lse and total, (tokens,) each: see `steps.Known` and `steps.Running`.

    Args:
        total: given where, and only where, there is label smoothing.
        labels: (tokens,) int64 in [0, words).
    """
    losses, e = nll, options.label_smoothing
    classes = None if class_weight is None else class_weight.to(losses.dtype)
    if classes is not None:
        losses = losses * classes[labels]
    if total is not None:
        every = words if classes is None else classes.sum()
        losses = (1 - e) * losses + e / words * (every * lse - total)
    return losses + options.z_loss * lse**2 if options.z_loss else losses


def reduced(
    losses: Tensor,
    labels: Tensor,
    counted: Tensor,
    reduction: str,
    num_items: int | Tensor | None,
    class_weight: Tensor | None,
) -> Tensor:
    """0-d, or (tokens,) for "none", of losses (tokens,).

    Args:
        labels: (tokens,) int64 in [0, words); read with class_weight alone.
        counted: (tokens,) bool.
    """
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if num_items is not None:
        return losses.sum() / num_items
    if class_weight is None:
        return losses.sum() / counted.sum()
    return losses.sum() / torch.where(counted, class_weight.to(losses.dtype)[labels], 0.0).sum()
