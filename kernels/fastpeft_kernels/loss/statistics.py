"""What is known of each row of given logits, and the logits' gradient out of that: one pass over memory each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import steps
from .backends import logits_backend
from .logit_map import PLAIN, LogitMap
from .rows import pieces
from .steps import Running, known


class Statistics(NamedTuple):
    """(tokens,) each, fp32 at least; zero where the label is ignored but for the last three, which backward reads.

    Attributes:
        nll, lse, top, inverse, others: see `steps.Known`.
        total: see `steps.Running`; None unless wanted.
    """

    nll: Tensor
    lse: Tensor
    total: Tensor | None
    top: Tensor
    inverse: Tensor
    others: Tensor


def statistics(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    total: bool,
    backend: str,
    logit_map: LogitMap = PLAIN,
) -> Statistics:
    """Of logits (tokens, words), columns contiguous, that are not written to.

    Args:
        labels: (tokens,) int64, each in [0, words) or ignore_index.
        class_weight: (words,) or None; read for `total` alone.
        backend: see `backends`.
        logit_map: what is still to be done to the logits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    running = Running.start(logits.shape[0], wide, logits.device, total=total)
    if logits_backend(backend, logits) == "triton":
        from .triton_steps import online_step

        named = logit_map._asdict() | {"class_weight": class_weight, "ignore_index": ignore_index}
        online_step(logits, 0, labels, running, **named)
    else:
        parts = [
            _piece(logits[rows].to(wide, copy=True), labels[rows], class_weight, total, logit_map)
            for rows in pieces(logits)
        ]
        for name in ("top", "others", "label", *(["total"] if total else [])):
            setattr(running, name, torch.cat([getattr(running, name)[:0], *(getattr(part, name) for part in parts)]))
    found, counted = known(running), labels != ignore_index
    nll, lse = (torch.where(counted, x, 0.0) for x in (found.nll, found.lse))
    sums = None if running.total is None else torch.where(counted, running.total, 0.0)
    return Statistics(nll, lse, sums, found.top, found.inverse, found.others)


def _piece(own: Tensor, labels: Tensor, class_weight: Tensor | None, total: bool, logit_map: LogitMap) -> Running:
    running = Running.start(own.shape[0], own.dtype, own.device, total=total)
    if own.shape[1]:
        steps.online_step(own, 0, labels, running, class_weight=class_weight, **logit_map._asdict())
    return running


def statistics_backward(
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    top: Tensor,
    inverse: Tensor,
    others: Tensor,
    backend: str,
) -> Tensor:
    """The gradient in logits, of their dtype, in memory of its own; zero where the label is ignored."""
    counted = labels != ignore_index
    d_nll, d_lse, d_total = (None if d is None else torch.where(counted, d, 0.0) for d in (d_nll, d_lse, d_total))
    dlogits = torch.empty(tuple(logits.shape), dtype=logits.dtype, device=logits.device)
    if logits_backend(backend, logits) == "triton":
        from .triton_steps import gradient_step

        known_rows = (top, inverse, others, d_nll, d_lse, d_total)
        gradient_step(logits, 0, labels, *known_rows, class_weight=class_weight, out=dlogits)
        return dlogits
    for part in pieces(logits):
        own = dlogits[part].copy_(logits[part])
        of_nll, of_lse, of_total = (None if d is None else d[part] for d in (d_nll, d_lse, d_total))
        known_rows = (top[part], inverse[part], others[part], of_nll, of_lse, of_total)
        steps.gradient_step(own, 0, labels[part], *known_rows, class_weight=class_weight)
        own[~counted[part]] = 0.0  # whatever the logits are
    return dlogits
