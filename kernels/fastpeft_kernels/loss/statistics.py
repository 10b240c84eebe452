"""What is known of each row of given logits, and the logits' gradient out of that: one pass over memory each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import logits_backend
from .logit_map import PLAIN, LogitMap
from .rows import pieces
from .steps import Running, known, to_logits
from .whole_rows import gradient_of, running_of


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
        room = _Room(logits, wide)
        parts = []
        for rows in pieces(logits):
            z = room.logits(logits[rows], logit_map)
            parts.append(running_of(z, labels[rows], class_weight, total=total, room=room.other(z.shape[0])))
        for name in ("top", "others", "label", *(["total"] if total else [])):
            setattr(running, name, torch.cat([getattr(running, name)[:0], *(getattr(part, name) for part in parts)]))
    found, counted = known(running), labels != ignore_index
    nll, lse = (torch.where(counted, x, 0.0) for x in (found.nll, found.lse))
    sums = None if running.total is None else torch.where(counted, running.total, 0.0)
    return Statistics(nll, lse, sums, found.top, found.inverse, found.others)


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
    room = _Room(logits, top.dtype)
    for part in pieces(logits):
        own = dlogits[part]
        z = room.logits(logits[part], PLAIN)
        of_nll, of_lse, of_total = (None if d is None else d[part] for d in (d_nll, d_lse, d_total))
        out = own if own.dtype == z.dtype else room.other(own.shape[0])
        gradient_of(z, labels[part], others[part], of_nll, of_lse, of_total, class_weight, out)
        if out is not own:
            own.copy_(out)
        own[~counted[part]] = 0.0  # whatever the logits are
    return dlogits


class _Room:
    """Memory for the logits of a piece of rows in `dtype`, and for as many values made of them."""

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        tokens = min(logits.shape[0], next(pieces(logits), slice(0)).stop)
        self._made, self._other = (
            torch.empty((tokens, logits.shape[1]), dtype=dtype, device=logits.device) for _ in range(2)
        )

    def logits(self, raw: Tensor, logit_map: LogitMap) -> Tensor:
        """What the map makes of raw (rows, words), which is not written to."""
        if raw.dtype == self._made.dtype and logit_map is PLAIN:
            return raw
        return to_logits(self._made[: raw.shape[0]].copy_(raw), *logit_map)

    def other(self, rows: int) -> Tensor:
        return self._other[:rows]
