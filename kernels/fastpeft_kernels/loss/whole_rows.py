"""What `steps` does, of rows that hold all their words: PyTorch's softmax is one operation, the steps are four."""

from __future__ import annotations

import torch
from torch import Tensor

from .steps import Running


def running_of(
    z: Tensor, labels: Tensor, class_weight: Tensor | None, *, total: bool, room: Tensor | None = None
) -> Running:
    """`Running` after the only step.

    Args:
        z: (tokens, words) logits, fp32 or fp64, not written to; words >= 1.
        labels: (tokens,) int64; any value stands for the label of a row that counts for nothing.
        class_weight: (words,) or None; read for `total` alone.
        room: as z, for intermediate values.
    """
    column = labels.clamp(0, z.shape[1] - 1)[:, None]
    top, p = z.amax(-1), torch.softmax(z, -1, out=room)
    whole = p.amax(-1).reciprocal_()  # p is 1 over the sum where z is top
    others = p.scatter_(1, column, 0.0).sum(-1).mul_(whole)
    others.masked_fill_(top == -torch.inf, 0.0)
    top.clamp_(min=torch.finfo(z.dtype).min)
    weighted = None
    if total:
        weighted = z.sum(-1) if class_weight is None else z @ class_weight.to(z.dtype)
    return Running(top, others, z.gather(1, column)[:, 0], torch.zeros_like(top), total=weighted)


def gradient_of(
    z: Tensor,
    labels: Tensor,
    others: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    class_weight: Tensor | None,
    out: Tensor,
) -> None:
    """Fills `out`, as z, with what `gradient_step` makes of it; the arguments are those of both."""
    column = labels.clamp(0, z.shape[1] - 1)[:, None]
    if d_nll is None and d_lse is None:
        out.zero_()
    else:
        torch.softmax(z, -1, out=out)
        of_label = None if d_lse is None else d_lse * out.gather(1, column)[:, 0]
        at_label = of_label if d_nll is None else -d_nll * others if of_label is None else of_label - d_nll * others
        of_p = d_nll if d_lse is None else d_lse if d_nll is None else d_nll + d_lse
        assert of_p is not None and at_label is not None
        out.mul_(of_p[:, None]).scatter_(1, column, at_label[:, None])
    if d_total is not None:
        out.add_(d_total[:, None] if class_weight is None else d_total[:, None] * class_weight.to(z.dtype))
