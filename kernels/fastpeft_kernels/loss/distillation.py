"""Linear distillation: how far a student is from its teacher, from hidden states and heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tracing import as_op
from ..weights import DenseWeight, FrozenWeight
from . import distillation_autograd, distillation_op
from .call import Trained
from .combining import reduced
from .distillation_call import Fixed, Outputs
from .distillation_checks import check_teacher, check_ways
from .distillation_loops import Soft
from .head import Head, Teacher, TopLogits
from .inputs import compute_dtype, computed_tokens, trained_and_stored
from .validation import check_head, check_hidden, check_labels, check_mask, check_reduction


class LinearDistillation(NamedTuple):
    """What `linear_distillation` gives.

    Attributes:
        loss: 0-d, or (...) for reduction "none"; fp32 (fp64 in fp64). Differentiable.
        divergence: (...) of each token, zero where it is not counted. No gradient.
        nll: (...) minus the log-probability of each label, at temperature 1, zero where it is not counted; None without
            a weight of the cross-entropy. No gradient.
    """

    loss: Tensor
    divergence: Tensor
    nll: Tensor | None = None


def linear_distillation(
    hidden: Tensor,
    head: Head,
    teacher: Teacher | TopLogits,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> LinearDistillation:
    """How far the student's distribution is from its teacher's, without either's logits in memory.

    The loss of a token is divergence_weight times `kl_divergence` (forward KL for beta = 0, reverse KL for beta = 1,
    the generalised Jensen-Shannon divergence between; both logits over temperature) plus cross_entropy_weight times
    the cross-entropy of its label at temperature 1. As in TRL nothing is multiplied with temperature^2: for Hinton's
    loss divergence_weight is (1 - a) temperature^2 and cross_entropy_weight a.

    Of logits there are those of some tokens at a time, 256 MB or 512 tokens. With a head that is not trained the
    gradient comes out of the forward pass: three products of tokens x words x hidden_size in all, one of them the
    teacher's. With a trained head both logits are made once more in backward: six, and four for tokens whose gradient
    in the student's logits can be kept, as logits are in `linear_cross_entropy`. Tokens that do not count are left out,
    but under `torch.compile` and in a CUDA graph, where their number cannot be asked.

    Args:
        hidden: (..., hidden_size), the student's, floating, any strides.
        head: the student's map onto words.
        teacher: hidden states and a head of its own, whose size may be another, or its largest logits. With these the
            divergence is that from their distribution over k words, renormalised, while the student's is over all
            words; beta = 1 is refused, which is infinite where the teacher has no probability.
        labels: (...) int64, each in [0, words) or ignore_index, of the hidden states beside them; or None, where
            cross_entropy_weight is zero. Tokens without a label are not counted.
        mask: (...) bool, True for tokens that are counted; None for all that have a label.
        beta: in [0, 1].
        temperature: > 0.
        divergence_weight, cross_entropy_weight: >= 0.
        reduction: "mean", over the counted tokens, zero where there are none; "sum"; or "none".
        num_items: divides the sum in place of the number of counted tokens; a number or a 0-d tensor; only with "mean".

    Returns:
        `LinearDistillation`. Gradients flow to the student's hidden, weight where that is a tensor, bias, s and b,
        once: a second derivative is an error.

    Raises:
        TypeError, ValueError: an argument is not as above, or the vocabularies differ.
        RuntimeError: in backward, a frozen weight was written to or moved since forward.

    Source: On-Policy Distillation of Language Models, Agarwal et al. 2024, arXiv:2306.13649; Distilling the Knowledge
    in a Neural Network, Hinton et al. 2015, arXiv:1503.02531.
    """
    check_hidden(hidden)
    check_head(head, hidden)
    check_teacher(teacher, hidden, head.words, beta)
    check_ways(beta, temperature, divergence_weight, cross_entropy_weight, labels)
    check_reduction(reduction, num_items)
    lead = hidden.shape[:-1]
    counted = torch.ones(lead, dtype=torch.bool, device=hidden.device).reshape(-1)
    if labels is None:
        safe = torch.zeros_like(counted, dtype=torch.int64)
    else:
        check_labels(labels, hidden, head.words, ignore_index)
        counted = labels.reshape(-1) != ignore_index
        safe = torch.where(counted, labels.reshape(-1), 0)
    if mask is not None:
        check_mask(mask, hidden)
        counted = counted & mask.reshape(-1)
    soft = Soft(float(temperature), float(beta), float(divergence_weight), float(cross_entropy_weight))
    losses, divergence, nll = _compute(hidden, head, teacher, safe, counted, soft, reduction != "none")
    losses = torch.where(counted, losses, 0.0)
    if reduction == "mean" and num_items is None:
        num_items = counted.sum().clamp(min=1)
    loss = reduced(losses, safe, counted, reduction, num_items, None)
    return LinearDistillation(
        loss.view(lead) if reduction == "none" else loss, divergence.view(lead), None if nll is None else nll.view(lead)
    )


def _compute(
    hidden: Tensor,
    head: Head,
    teacher: Teacher | TopLogits,
    labels: Tensor,
    counted: Tensor,
    soft: Soft,
    keep: bool,
) -> Outputs:
    op = as_op()
    computed = None if op else computed_tokens(counted)
    weight, stored = trained_and_stored(head.weight)
    hidden, s = _rows(hidden), None if head.s is None else _rows(head.s)
    dtypes = (compute_dtype(hidden), compute_dtype(hidden if s is None else s))
    tensors, teacher_stored, ways, teacher_dtypes = _of_teacher(teacher)
    fixed = Fixed(
        labels, computed, counted if computed is None else None, *tensors, stored, teacher_stored,
        head.scale, head.softcap, *ways, *dtypes, *teacher_dtypes, soft, keep,
    )  # fmt: skip
    return (distillation_op if op else distillation_autograd).apply(
        Trained(hidden, weight, head.bias, s, head.b), fixed
    )


class _OfTeacher(NamedTuple):
    """The teacher's in `Fixed`."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    stored: FrozenWeight | None
    ways: tuple[float, float | None]
    dtypes: tuple[torch.dtype, torch.dtype]


def _of_teacher(teacher: Teacher | TopLogits) -> _OfTeacher:
    if isinstance(teacher, TopLogits):
        dtype = teacher.logits.dtype
        given = (None, None, None, None, _rows(teacher.logits), _rows(teacher.words))
        return _OfTeacher(given, None, (1.0, None), (dtype, dtype))
    head, hidden = teacher.head, _rows(teacher.hidden)
    weight = head.weight if isinstance(head.weight, FrozenWeight) else DenseWeight(head.weight.detach())
    bias, b = (None if x is None else x.detach() for x in (head.bias, head.b))
    s = None if head.s is None else _rows(head.s.detach())
    dtypes = (compute_dtype(hidden), compute_dtype(hidden if s is None else s))
    return _OfTeacher((hidden, bias, s, b, None, None), weight, (head.scale, head.softcap), dtypes)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
