"""Losses over a vocabulary in plain PyTorch, in any floating dtype: the oracle, which makes all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import FrozenWeight
from .head import Head, Options

PLAIN = Options()


def logits_reference(hidden: Tensor, head: Head) -> Tensor:
    """(..., words) in the dtype of `hidden`, differentiable in everything that requires it."""
    weight = head.weight.decode(dtype=hidden.dtype) if isinstance(head.weight, FrozenWeight) else head.weight
    logits = hidden @ weight.to(hidden.dtype).t()
    if head.s is not None and head.b is not None:
        logits = logits + (head.s @ head.b.to(head.s.dtype).t()).to(hidden.dtype)
    if head.bias is not None:
        logits = logits + head.bias.to(hidden.dtype)
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def token_losses_reference(
    logits: Tensor, labels: Tensor, options: Options = PLAIN, class_weight: Tensor | None = None
) -> Tensor:
    """Loss of each token (tokens,), of logits (tokens, words), computed in fp32 at least."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    counted = labels != options.ignore_index
    y = torch.where(counted, labels, 0)
    minus_log_p = -F.log_softmax(z, -1)
    c = torch.ones(z.shape[-1], dtype=z.dtype, device=z.device) if class_weight is None else class_weight.to(z.dtype)
    loss = (1 - options.label_smoothing) * c[y] * minus_log_p.gather(-1, y[:, None])[:, 0]
    if options.label_smoothing:
        loss = loss + options.label_smoothing / z.shape[-1] * (minus_log_p * c).sum(-1)
    if options.z_loss:
        loss = loss + options.z_loss * torch.logsumexp(z, -1) ** 2
    return torch.where(counted, loss, 0.0)


def entropy_reference(logits: Tensor) -> Tensor:
    """-sum p log p of each token, (tokens,), of logits (tokens, words)."""
    log_p = F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)


def mean_reference(logits: Tensor) -> Tensor:
    """Mean over the words of each token, (tokens,), of logits (tokens, words)."""
    return (logits if logits.dtype == torch.float64 else logits.float()).mean(-1)
