"""Linear cross-entropy: the loss of hidden states under a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head, Options
from .reference import entropy_reference, logits_reference, token_losses_reference

REDUCTIONS = ("mean", "sum", "none")


class LinearLoss(NamedTuple):
    """What `linear_cross_entropy` gives.

    Attributes:
        loss: 0-d, or (...) as the labels for reduction "none"; fp32 (fp64 in fp64). Differentiable.
        log_probs: (...) log-probability of each label, zero where it is ignored; None unless asked for. Differentiable.
        entropy: (...) -sum p log p in nats, zero where the label is ignored; None unless asked for. No gradient.
        correct: (...) bool, whether the label has the largest logit; None unless asked for.
    """

    loss: Tensor
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    log_probs: bool = False,
    entropy: bool = False,
    correct: bool = False,
) -> LinearLoss:
    """Cross-entropy of the labels under the head's distribution.

    Equivalent PyTorch: `F.cross_entropy(cap(scale * F.linear(hidden, W, bias)).float(), labels)`; see `Head`, `Options`
    and `loss.reference`. Labels belong to the hidden states beside them: nothing is shifted.

    Args:
        hidden: (..., hidden_size), floating.
        head: the map onto words.
        labels: (...) int64, each in [0, words) or `ignore_index`.
        reduction: "mean", over the class weights of the counted labels, as `F.cross_entropy`; "sum"; or "none".
        num_items: divides the sum of the losses in place of the mean's own count (transformers' `num_items_in_batch`);
            a number or a 0-d tensor; only with "mean".
        ignore_index, label_smoothing, z_loss: see `Options`.
        class_weight: (words,) or None.
        token_weight: (...) or None; factor of each token's loss; it does not change what the mean divides by.
        log_probs, entropy, correct: whether these are wanted too.

    Returns:
        `LinearLoss`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    options = Options(ignore_index, label_smoothing, z_loss)
    logits = logits_reference(hidden, head).flatten(0, -2)
    flat = labels.flatten()
    counted = flat != ignore_index
    losses = token_losses_reference(logits, flat, options, class_weight)
    if token_weight is not None:
        losses = losses * token_weight.flatten()
    if reduction == "none":
        loss = losses.view(labels.shape)
    elif reduction == "sum":
        loss = losses.sum()
    else:
        count = counted.sum() if class_weight is None else class_weight[flat.where(counted, 0)].where(counted, 0).sum()
        loss = losses.sum() / (count if num_items is None else num_items)
    zero = torch.zeros((), dtype=losses.dtype, device=losses.device)
    return LinearLoss(
        loss,
        -token_losses_reference(logits, flat, Options(ignore_index)).view(labels.shape) if log_probs else None,
        entropy_reference(logits.detach()).where(counted, zero).view(labels.shape) if entropy else None,
        ((logits.argmax(-1) == flat) & counted).view(labels.shape) if correct else None,
    )
