"""What lies between the products of a fused loss, on a block of tokens and a chunk of words, in plain PyTorch.

raw (tokens, C) holds h W^T + s B^T of the words first..first + C - 1, before bias, scale and cap:
z = cap(scale * (raw + bias)). Sums over words are kept as exponentials relative to a reference point of each token, and
the label's word apart from all others: p[y] - 1 = -(sum of all other p) keeps its digits where p[y] is nearly one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SLACK = 5.0
"""By how much a logit must exceed the reference point before that moves to it. Sums are rescaled only then."""


@dataclass(slots=True)
class Running:
    """Of a block of tokens, after some chunks of words; fp32, or fp64 where raw is. A step leaves the new values here.

    Attributes:
        top: (tokens,) reference point of the exponentials: largest logit of an earlier moment, no more than `slack`
            under the largest so far; the dtype's least number before the first step, and where all were -inf.
        others: (tokens,) sum over v != y of exp(z[v] - top).
        label: (tokens,) z[y]; -inf until its chunk was met.
        factor: (tokens,) what sums made before the last step are to be multiplied with: exp(old top - new top), which
            is exactly 1 almost always, and 0 at the first step.
        tilted: (tokens,) sum over all v of exp(z[v] - top) (z[v] - top), with 0 for z[v] = -inf; or None, not wanted.
        high: (tokens,) largest logit so far; or None.
        best: (tokens,) int64, the first word that has it; None when, and only when, high is.
        total: (tokens,) sum over all v of c[v] z[v], c = class_weight or ones; or None.
    """

    top: Tensor
    others: Tensor
    label: Tensor
    factor: Tensor
    tilted: Tensor | None = None
    high: Tensor | None = None
    best: Tensor | None = None
    total: Tensor | None = None

    @property
    def slack(self) -> float:
        """By how much a logit must exceed top to become it. None for the entropy, of which no digits are to cancel."""
        return SLACK if self.tilted is None else 0.0

    @classmethod
    def start(
        cls,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tilted: bool = False,
        best: bool = False,
        total: bool = False,
    ) -> Running:
        """Before the first step; the flags say what is wanted beyond the loss."""

        def full(value: float) -> Tensor:
            return torch.full((tokens,), value, dtype=dtype, device=device)

        return cls(
            top=full(torch.finfo(dtype).min),
            others=full(0.0),
            label=full(-torch.inf),
            factor=full(0.0),
            tilted=full(0.0) if tilted else None,
            high=full(-torch.inf) if best else None,
            best=torch.zeros(tokens, dtype=torch.int64, device=device) if best else None,
            total=full(0.0) if total else None,
        )


def online_step(
    raw: Tensor,
    first: int,
    labels: Tensor,
    running: Running,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    write: bool = False,
) -> None:
    """Takes one chunk of words into `running`.

    Args:
        raw: (tokens, C), floating, rows contiguous. Where `write`, overwritten with exp(z - top) * cap'(scale * (raw +
            bias)) for the new top, and with zero at the label's word: what multiplies the words' rows of W in a sum
            over v != y that is yet to be divided, and multiplied by scale. Else its values are lost.
        first: the chunk's first word.
        labels: (tokens,) int64.
        bias, class_weight: (C,), of the chunk, any floating dtype; class_weight is read for `total` alone.
    """
    z = to_logits(raw, bias, scale, softcap)
    if running.total is not None:
        weighted = z.sum(-1) if class_weight is None else z @ class_weight.to(z.dtype)
        running.total = running.total + weighted
    if running.best is None or running.high is None:
        highest = z.amax(-1)
    else:
        highest, index = z.max(-1)
        higher = highest > running.high
        running.best = torch.where(higher, index + first, running.best)
        running.high = torch.where(higher, highest, running.high)
    top = torch.where(highest > running.top + running.slack, highest, running.top)
    shift = (running.top - top).clamp_(min=-1e4)  # of which the exponential is zero
    running.factor = shift.exp()
    column, inside = _label_column(labels, first, z.shape[1])
    before = running.others + torch.exp(running.label - running.top)
    running.label = torch.where(inside, z.gather(1, column)[:, 0], running.label)
    running.top = top
    slope = None if softcap is None or not write else _cap_slope(z, softcap)
    z.sub_(top[:, None])
    weights = z.exp() if running.tilted is not None else z.exp_()
    if running.tilted is not None:
        part = torch.where(weights == 0, 0.0, weights * z).sum(-1)
        running.tilted = running.factor * (running.tilted + shift * before) + part
    weights.scatter_(1, column, torch.where(inside[:, None], 0.0, weights.gather(1, column)))
    running.others = torch.addcmul(weights.sum(-1), running.factor, running.others)
    if write:
        if slope is not None:
            weights.mul_(slope)
        if weights is not raw:
            raw.copy_(weights)


def gradient_step(
    raw: Tensor,
    first: int,
    labels: Tensor,
    top: Tensor,
    inverse: Tensor,
    others: Tensor,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,
) -> None:
    """Overwrites raw with the gradient in it of sum_t d_nll (lse - z[y]) + d_lse lse + d_total sum_v c[v] z[v].

    But for the factor scale, which belongs into the three (they are row factors):

        cap'(scale * (raw + bias)) * ((d_nll + d_lse) p[v] - d_nll [v = y] + d_total c[v])

    with p[v] = exp(z[v] - top) inverse,
    and the label's is computed as d_lse p[y] - d_nll others + d_total c[y].

    Args:
        raw, first, labels, bias, class_weight: as for `online_step`.
        top: (tokens,) of `Running` after the last chunk.
        inverse: (tokens,) one over the sum over all v of exp(z[v] - top).
        others: (tokens,) the sum over v != y of p[v].
        d_nll, d_lse, d_total: (tokens,) each, dtype of top, or None for zeros.
    """
    z = to_logits(raw, bias, scale, softcap)
    column, inside = _label_column(labels, first, z.shape[1])
    slope = None if softcap is None else _cap_slope(z, softcap)
    of_p = d_nll if d_lse is None else d_lse if d_nll is None else d_nll + d_lse
    exps = z.sub_(top[:, None]).exp_()
    at_label = torch.zeros_like(top) if d_nll is None else -d_nll * others
    if d_lse is not None:
        at_label = torch.addcmul(at_label, d_lse, exps.gather(1, column)[:, 0] * inverse)
    gradient = exps.zero_() if of_p is None else exps.mul_((of_p * inverse)[:, None])
    gradient.scatter_(1, column, torch.where(inside[:, None], at_label[:, None], gradient.gather(1, column)))
    if d_total is not None:
        weight = 1.0 if class_weight is None else class_weight.to(z.dtype)
        gradient.add_(d_total[:, None] * weight)
    if slope is not None:
        gradient.mul_(slope)
    if gradient is not raw:
        raw.copy_(gradient)


def rescale(sums: Tensor, factor: Tensor) -> None:
    """sums (tokens, columns) *= factor (tokens,), both wide; rows whose factor is 1 need not be touched."""
    if sums.device.type != "cpu" or bool((factor != 1).any()):
        sums.mul_(factor[:, None])


@dataclass(slots=True)
class Known:
    """Of a block of tokens, after the last chunk; (tokens,) each, in the dtype of `Running`.

    Attributes:
        nll: lse - z[y] = -log p[y]; keeps its digits where the label is confident.
        lse: logarithm of the sum of all exp(z).
        top, inverse, others: see `gradient_step`.
        label: z[y].
    """

    nll: Tensor
    lse: Tensor
    top: Tensor
    inverse: Tensor
    others: Tensor
    label: Tensor


def known(running: Running) -> Known:
    """What the steps have gathered."""
    top, label = running.top, running.label
    at_label = torch.exp(label - top)
    whole = running.others + at_label
    nll = F.softplus(running.others.log() + (top - label), threshold=50.0)
    inverse = whole.reciprocal()
    p = at_label * inverse
    others = torch.where(p < 0.5, 1 - p, running.others * inverse)  # of the two the one that rounds less
    return Known(nll, top + whole.log(), top, inverse, others, label)


def entropy(running: Running) -> Tensor:
    """(tokens,) -sum p log p in nats; `running.tilted` must have been wanted."""
    whole = running.others + torch.exp(running.label - running.top)
    assert running.tilted is not None
    return whole.log() - running.tilted / whole


def to_logits(raw: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """z in fp32 at least; in the memory of raw where that is wide."""
    z = raw if raw.dtype.itemsize >= 4 else raw.float()
    if bias is not None:
        z = z.add_(bias)
    if softcap is not None:
        return z.mul_(scale / softcap).tanh_().mul_(softcap)
    return z if scale == 1.0 else z.mul_(scale)


def cap_slope(z: Tensor, softcap: float | None) -> Tensor:
    """cap'(x) where cap(x) = z, of any shape."""
    return torch.ones_like(z) if softcap is None else _cap_slope(z, softcap)


def _cap_slope(z: Tensor, softcap: float) -> Tensor:
    return torch.addcmul(torch.ones((), dtype=z.dtype, device=z.device), z, z, value=-1.0 / softcap**2)


def _label_column(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(tokens, 1) the label's column in a chunk, any where it has none; (tokens,) whether it has one."""
    local = labels - first
    return local.clamp(0, width - 1)[:, None], (local >= 0) & (local < width)
