"""A call of the fused loss, forward and backward, as autograd and the custom op both make it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import product_dtype
from ..lora.autograd import in_use
from ..weights import DenseWeight, FrozenWeight
from .forward import forward
from .label_rows import label_rows
from .online import scaled_rows
from .problem import Needs, Problem, Wants
from .recompute import recompute


class Fixed(NamedTuple):
    """What is not trained: three tensors, and more; as of `Problem`.

    Attributes:
        stored: the weight; None where it is trained.
        dtype, low_dtype: of the products, wherever the device multiplies these fast.
    """

    labels: Tensor
    computed: Tensor | None
    class_weight: Tensor | None
    stored: FrozenWeight | None
    scale: float
    softcap: float | None
    dtype: torch.dtype
    low_dtype: torch.dtype
    wants: Wants


class Trained(NamedTuple):
    """What may be trained, or its gradients; as of `Problem`. weight is None where it is stored."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    s: Tensor | None
    b: Tensor | None


class Outputs(NamedTuple):
    """(tokens,) each, zero where one is not computed; nll, lse and total are differentiable. See `forward.Result`."""

    nll: Tensor
    lse: Tensor
    total: Tensor | None
    entropy: Tensor | None
    correct: Tensor | None


class Kept(NamedTuple):
    """For backward: the first three where `forward` made the gradients of rows, else the last three."""

    d_hidden: Tensor | None = None
    d_s: Tensor | None = None
    slope: Tensor | None = None
    top: Tensor | None = None
    inverse: Tensor | None = None
    others: Tensor | None = None


def online(needs: Needs, wants: Wants) -> bool:
    """Whether `forward` makes the gradients: where none but of hidden and s are wanted, and of nll and lse alone."""
    return not (needs.weight or needs.bias or needs.b or wants.total)


def compute(trained: Trained, fixed: Fixed, needs: Needs) -> tuple[Outputs, Kept]:
    """Forward, with what backward reads where `needs` asks for any gradient."""
    problem, rows = _problem(trained, fixed), online(needs, fixed.wants)
    with in_use((problem,)):
        found = forward(problem, fixed.wants, needs if rows else Needs())
    outputs = Outputs(found.nll, found.lse, found.total, found.entropy, found.correct)
    if not any(needs):
        return outputs, Kept()
    if rows:
        return outputs, Kept(found.rows.hidden, found.rows.s, found.slope)
    return outputs, Kept(top=found.top, inverse=found.inverse, others=found.others)


def read_by_backward(trained: Trained, kept: Kept) -> Trained:
    return trained if kept.slope is None else Trained(None, None, None, None, trained.b)


def reads_weight(kept: Kept, d_lse: Tensor | None) -> bool:
    """Whether `compute_backward` does."""
    return kept.slope is None or d_lse is not None


def compute_backward(
    trained: Trained,
    fixed: Fixed,
    needs: Needs,
    kept: Kept,
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    spend: bool,
) -> Trained:
    """The gradients that `needs` asks for, each in the dtype of what it belongs to.

    Args:
        trained: `read_by_backward` of it.
        d_nll, d_lse, d_total: (tokens,), zero where one is not computed; None for zeros, but not all.
        spend: whether what is kept may be overwritten.
    """
    if kept.slope is not None:
        return _scale_rows(trained, fixed, kept, d_nll, d_lse, spend)
    problem = _problem(trained, fixed)
    assert kept.top is not None and kept.inverse is not None and kept.others is not None
    with in_use((problem,)):
        found = recompute(problem, needs, kept.top, kept.inverse, kept.others, d_nll, d_lse, d_total)
    pairs = zip(found, trained, strict=True)
    return Trained(*(None if grad is None or t is None else grad.to(t.dtype) for grad, t in pairs))


def _scale_rows(
    trained: Trained, fixed: Fixed, kept: Kept, d_nll: Tensor | None, d_lse: Tensor | None, spend: bool
) -> Trained:
    """d nll = rows, and d lse = rows + slope * (the label's row)."""
    factor = d_nll if d_lse is None else d_lse if d_nll is None else d_nll + d_lse
    of_label = None if d_lse is None or kept.slope is None else d_lse * kept.slope
    assert factor is not None and fixed.stored is not None
    hidden = s = None
    if kept.d_hidden is not None:
        with in_use((Held(fixed.stored),)):
            rows = label_rows(fixed.stored, fixed.labels, fixed.dtype)
            hidden = scaled_rows(kept.d_hidden, factor, of_label, rows, spend)
    if kept.d_s is not None and trained.b is not None:
        whole = slice(0, fixed.labels.shape[0])
        s = scaled_rows(kept.d_s, factor, of_label, [(whole, trained.b.index_select(0, fixed.labels))], spend)
    return Trained(hidden, None, None, s, None)


class Held(NamedTuple):
    weight: FrozenWeight


def _problem(trained: Trained, fixed: Fixed) -> Problem:
    hidden, weight, bias, s, b = (None if t is None else t.detach() for t in trained)
    frozen = fixed.stored if weight is None else DenseWeight(weight)
    assert hidden is not None and frozen is not None
    return Problem(
        hidden,
        frozen,
        fixed.labels,
        fixed.computed,
        None if bias is None else bias.contiguous(),
        s,
        b,
        None if fixed.class_weight is None else fixed.class_weight.contiguous(),
        fixed.scale,
        fixed.softcap,
        product_dtype(fixed.dtype, hidden.device),
        product_dtype(fixed.low_dtype, hidden.device),
    )
