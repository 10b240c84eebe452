"""Linear cross-entropy: the loss of hidden states under a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tracing import as_op
from . import autograd, custom_op
from .call import Fixed, Outputs, Trained
from .combining import reduced, token_losses
from .head import Head, Options
from .inputs import compute_dtype, computed_tokens, trained_and_stored
from .problem import Wants
from .validation import check_head, check_hidden, check_labels, check_options, check_reduction, check_weights


class LinearLoss(NamedTuple):
    """What `linear_cross_entropy` gives.

    Attributes:
        loss: 0-d, or (...) as the labels for reduction "none"; fp32 (fp64 in fp64). Differentiable.
        log_probs: (...) log-probability of each label, zero where it is ignored; None unless asked for. Differentiable.
        entropy: (...) -sum p log p in nats, zero where the label is ignored; None unless asked for. No gradient.
        correct: (...) bool, whether the label has the largest logit, the first of several; None unless asked for.
        mean_logits: (...) mean of the logits over the words, zero where the label is ignored; None unless asked for. No
            gradient.
    """

    loss: Tensor
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    mean_logits: Tensor | None = None


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
    mean_logits: bool = False,
) -> LinearLoss:
    """Cross-entropy of the labels under the head's distribution, without logits in memory.

    Equivalent PyTorch: `F.cross_entropy(cap(scale * F.linear(hidden, W, bias)).float(), labels)`; see `Head`, `Options`
    and `loss.reference`. Labels belong to the hidden states beside them: nothing is shifted. Sums are in fp32 at least.
    Under autocast hidden, weight, s and b are multiplied in its dtype.

    The gradient of the hidden states comes out of the forward pass: two products of tokens x words x hidden_size in
    all under a head that is not trained. For the gradients of one that is the logits are made once more in backward:
    four. Of as many tokens as the weight has features they wait, without other memory, where the weight's gradient will
    be, where this call's loss is one number and no log_probs are asked for: three products for these tokens. Label
    smoothing costs one product more, but not under a trained head on a CPU where sums of all tokens are few beside the
    logits. Ignored tokens are left out, but under `torch.compile` and in a CUDA graph, where
    their number cannot be asked.

    Args:
        hidden: (..., hidden_size), floating, any strides.
        head: the map onto words.
        labels: (...) int64, each in [0, words) or `ignore_index`.
        reduction: "mean", over the class weights of the counted labels, as `F.cross_entropy`; "sum"; or "none".
        num_items: divides the sum of the losses in place of the mean's own count (transformers' `num_items_in_batch`);
            a number or a 0-d tensor; only with "mean".
        ignore_index, label_smoothing, z_loss: see `Options`.
        class_weight: (words,) floating, or None; no gradient.
        token_weight: (...) floating, or None; factor of each token's loss; it does not change what the mean divides by.
        log_probs, entropy, correct, mean_logits: whether these are wanted too; the last not with both class weights and
            label smoothing.

    Returns:
        `LinearLoss`. Gradients flow to hidden, to a weight that is a tensor, bias, s, b and token_weight, once: a
        second derivative is an error. With no counted label the mean is NaN, as in PyTorch, and gradients are zero.

    Raises:
        TypeError, ValueError: an argument is not as above. Labels outside [0, words) are found on a CPU alone; on a GPU
            they fail a device's assertion, as in PyTorch, or their loss is infinite.
        RuntimeError: in backward, a frozen weight was written to or moved since forward.

    Source: Cut Your Losses in Large-Vocabulary Language Models, Wijmans et al. 2024, arXiv:2411.09009; and `online`.
    """
    check_hidden(hidden)
    check_head(head, hidden)
    check_labels(labels, hidden, head.words, ignore_index)
    options = Options(ignore_index, label_smoothing, z_loss)
    check_options(options)
    check_weights(class_weight, token_weight, labels, head.words)
    check_reduction(reduction, num_items)
    summed = class_weight if label_smoothing > 0 else None
    if mean_logits and summed is not None:
        raise ValueError("mean_logits: expected no class_weight beside label_smoothing, got one")
    flat = labels.reshape(-1)
    counted = flat != ignore_index
    safe = torch.where(counted, flat, 0)
    wants = Wants(total=label_smoothing > 0, entropy=entropy, correct=correct, mean=mean_logits)
    # Losses of tokens may be of one call of many in a step, and each would hold a gradient's memory until backward.
    keep = reduction != "none" and not log_probs
    found = _compute(hidden, head, safe, counted, summed, wants, keep)
    total = found.total if wants.total else None
    losses = token_losses(found.nll, found.lse, total, options, class_weight, safe, head.words)
    losses = torch.where(counted, losses, 0.0)
    if token_weight is not None:
        losses = losses * token_weight.reshape(-1)
    loss = reduced(losses, safe, counted, reduction, num_items, class_weight)
    return LinearLoss(
        loss.view(labels.shape) if reduction == "none" else loss,
        torch.where(counted, -found.nll, 0.0).view(labels.shape) if log_probs else None,
        None if found.entropy is None else torch.where(counted, found.entropy, 0.0).view(labels.shape),
        None if found.correct is None else (found.correct & counted).view(labels.shape),
        None if found.total is None or not mean_logits else _mean(found.total, counted, head.words).view(labels.shape),
    )


def _mean(total: Tensor, counted: Tensor, words: int) -> Tensor:
    return torch.where(counted, total.detach() / words, 0.0)


def _compute(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    counted: Tensor,
    class_weight: Tensor | None,
    wants: Wants,
    keep: bool,
) -> Outputs:
    trained_weight, stored = trained_and_stored(head.weight)
    dtype, low_dtype = compute_dtype(hidden), hidden.dtype if head.s is None else compute_dtype(head.s)
    rows = hidden.reshape(-1, hidden.shape[-1])
    s = None if head.s is None else head.s.reshape(-1, head.s.shape[-1])
    trained = Trained(rows, trained_weight, head.bias, s, head.b)
    op = as_op()
    computed = None if op else computed_tokens(counted)
    fixed = Fixed(labels, computed, class_weight, stored, head.scale, head.softcap, dtype, low_dtype, wants, keep)
    return (custom_op if op else autograd).apply(trained, fixed)
