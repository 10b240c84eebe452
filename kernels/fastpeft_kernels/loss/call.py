"""A call of the fused loss, forward and backward, as autograd and the custom op both make it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import product_dtype
from ..lora.autograd import in_use
from ..weights import DenseWeight, FrozenWeight
from .forward import forward
from .kept_logits import KeptLogits
from .label_rows import label_rows
from .online import scaled_rows
from .problem import Needs, Problem, Wants
from .recompute import Known, one_walk, token_gradients, word_blocks, word_gradients
from .sums import TokenSums


class Fixed(NamedTuple):
    """What is not trained: three tensors, and more; as of `Problem`.

    Attributes:
        stored: the weight; None where it is trained.
        dtype, low_dtype: of the products, wherever the device multiplies these fast.
        keep: whether the memory of a trained weight's gradient may be taken in the forward pass, for logits.
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
    keep: bool = False


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
    """For backward: the first three where `forward` made the gradients of rows, the next where `recompute` makes any.

    Attributes:
        logits: the memory of `KeptLogits`, or None.
    """

    d_hidden: Tensor | None = None
    d_s: Tensor | None = None
    slope: Tensor | None = None
    top: Tensor | None = None
    inverse: Tensor | None = None
    others: Tensor | None = None
    logits: Tensor | None = None


def online(needs: Needs, wants: Wants) -> bool:
    """Whether `forward` makes the gradients of hidden and s: where total has none. It would take away most of the
    label's row, after that was added and rounded."""
    return needs.of_tokens and not wants.total


def again(needs: Needs, rows: bool) -> bool:
    """Whether backward makes logits once more, with gradients of rows from `forward` or without."""
    return needs.of_words or (needs.of_tokens and not rows)


def compute(trained: Trained, fixed: Fixed, needs: Needs) -> tuple[Outputs, Kept]:
    """Forward, with what backward reads where `needs` asks for any gradient."""
    problem, rows = _problem(trained, fixed), online(needs, fixed.wants)
    memory = KeptLogits.room(problem) if fixed.keep and needs.weight else None
    logits = None if memory is None else KeptLogits(memory, problem, word_blocks(problem, needs).words)
    with in_use((problem,)):
        found = forward(problem, fixed.wants, needs if rows else Needs(), logits)
    outputs = Outputs(found.nll, found.lse, found.total, found.entropy, found.correct)
    kept = Kept(logits=memory)
    if rows:
        kept = kept._replace(d_hidden=found.rows.hidden, d_s=found.rows.s, slope=found.slope)
    if again(needs, rows):
        kept = kept._replace(top=found.top, inverse=found.inverse, others=found.others)
    return outputs, kept


def read_by_backward(trained: Trained, kept: Kept) -> Trained:
    return trained if kept.top is not None else Trained(None, None, None, None, trained.b)


def reads_weight(kept: Kept, d_lse: Tensor | None) -> bool:
    """Whether `compute_backward` does."""
    return kept.top is not None or d_lse is not None


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
    """The gradients that `needs` asks for, each in the dtype of what it belongs to, or `kept_dtype` of that.

    Args:
        trained: `read_by_backward` of it.
        d_nll, d_lse, d_total: (tokens,), zero where one is not computed; None for zeros, but not all.
        spend: whether what is kept may be overwritten.
    """
    hidden = weight = bias = s = b = None
    if kept.slope is not None:
        hidden, s = _scale_rows(trained, fixed, kept, d_nll, d_lse, spend)
    if kept.top is not None and kept.inverse is not None and kept.others is not None:
        problem = _problem(trained, fixed)
        known = Known(kept.top, kept.inverse, kept.others, d_nll, d_lse, d_total)
        with in_use((problem,)):
            of_tokens = needs.of_tokens and kept.slope is None
            together = of_tokens and needs.of_words and one_walk(problem, needs)
            rows = TokenSums(problem, needs, problem.tokens) if together else None
            if of_tokens and not together:
                hidden, s = token_gradients(problem, needs, known)
            if needs.of_words:
                sums = word_gradients(problem, needs, known, kept.logits, spend, rows)
                weight, bias, b = sums.weight, sums.bias, sums.b
            if rows is not None:
                hidden, s = rows.hidden, rows.s
    return Trained(hidden, weight, bias, s, b)


def _scale_rows(
    trained: Trained, fixed: Fixed, kept: Kept, d_nll: Tensor | None, d_lse: Tensor | None, spend: bool
) -> tuple[Tensor | None, Tensor | None]:
    """d nll = rows, d lse = rows + slope * (the label's row)."""
    factor = d_nll if d_lse is None else d_lse if d_nll is None else d_nll + d_lse
    of_label = None if d_lse is None or kept.slope is None else d_lse * kept.slope
    assert factor is not None
    hidden = s = None
    if kept.d_hidden is not None:
        weight = _weight(trained, fixed)
        with in_use((Held(weight),)):
            rows = label_rows(weight, fixed.labels, fixed.dtype)
            hidden = scaled_rows(kept.d_hidden, factor, of_label, rows, spend)
    if kept.d_s is not None and trained.b is not None:
        labels = [(slice(0, fixed.labels.shape[0]), trained.b.index_select(0, fixed.labels))]
        s = scaled_rows(kept.d_s, factor, of_label, labels, spend)
    return hidden, s


class Held(NamedTuple):
    weight: FrozenWeight


def _weight(trained: Trained, fixed: Fixed) -> FrozenWeight:
    if trained.weight is not None:
        return DenseWeight(trained.weight.detach())
    assert fixed.stored is not None
    return fixed.stored


def _problem(trained: Trained, fixed: Fixed) -> Problem:
    hidden, _, bias, s, b = (None if t is None else t.detach() for t in trained)
    assert hidden is not None
    return Problem(
        hidden,
        _weight(trained, fixed),
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
