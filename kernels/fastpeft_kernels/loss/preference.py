"""Direct preference optimisation: losses of pairs of answers, from their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.validation import check_instance, check_tensor
from .validation import check_number


class DpoLoss(NamedTuple):
    """What `dpo_loss` gives, (pairs,) each.

    Attributes:
        losses: differentiable; TRL's loss is their mean.
        chosen_rewards, rejected_rewards: beta times the logarithm of policy over reference. No gradient.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
) -> DpoLoss:
    """How far a policy is from preferring the chosen answers, as TRL's `DPOTrainer` computes it.

    With d = log(policy / reference) of the chosen answer less that of the rejected one, and e = label_smoothing:

        sigmoid     -logsigmoid(beta d)
        hinge       max(0, 1 - beta d)
        ipo         (d - 1 / (2 beta))^2, with d of means over an answer's tokens
        robust      (-(1 - e) logsigmoid(beta d) + e logsigmoid(-beta d)) / (1 - 2 e)
        exo_pair    KL of (sigmoid(beta d), sigmoid(-beta d)) from (1 - e, e)

    `linear_cross_entropy(..., log_probs=True)` gives log-probabilities of labels without logits; an answer's is their
    sum. With LoRA the reference is the same model with its adapter off, under `no_grad`.

    Args:
        chosen, rejected: (pairs,) floating, sums of the policy's log-probabilities over each answer's tokens.
        reference_chosen, reference_rejected: (pairs,) of the reference; no gradient.
        kind: one of the above.
        beta: > 0.
        label_smoothing: the share of pairs that are taken to be the wrong way round: in [0, 0.5) for "robust", in
            (0, 0.5) for "exo_pair", else 0.
        chosen_tokens, rejected_tokens: (pairs,) number of tokens of each answer, for "ipo" alone.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Rafailov et al. 2023, arXiv:2305.18290 (sigmoid); Zhao et al. 2023, arXiv:2305.10425 (hinge); Azar et al.
    2023, arXiv:2310.12036 (ipo); Chowdhury et al. 2024, arXiv:2403.00409 (robust); Ji et al. 2024, arXiv:2402.00856
    (exo_pair).
    """
    references = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    for name, x in {"chosen": chosen, "rejected": rejected, **references}.items():
        check_instance(name, x, Tensor)
        check_tensor(name, x, chosen.device, tuple(chosen.shape[:1]), "chosen")
    for name, x in references.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected a tensor that requires no gradient, got one that does: detach it")
    _check_ways(kind, beta, label_smoothing)
    of_chosen, of_rejected = chosen - reference_chosen, rejected - reference_rejected
    rewards = (beta * of_chosen).detach(), (beta * of_rejected).detach()
    for name, tokens in (("chosen_tokens", chosen_tokens), ("rejected_tokens", rejected_tokens)):
        if (tokens is None) == (kind == "ipo"):
            got = "None" if tokens is None else "some"
            raise ValueError(f'{name}: expected the number of tokens for "ipo" and None for others, got {got}')
    if chosen_tokens is not None and rejected_tokens is not None:
        of_chosen, of_rejected = of_chosen / chosen_tokens.clamp(min=1), of_rejected / rejected_tokens.clamp(min=1)
    return DpoLoss(_KINDS[kind](of_chosen - of_rejected, beta, label_smoothing), *rewards)


def _check_ways(kind: str, beta: float, label_smoothing: float) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {tuple(_KINDS)}, got {kind!r}")
    check_number("beta", beta)
    check_number("label_smoothing", label_smoothing)
    if not beta > 0:
        raise ValueError(f"beta: expected a number > 0, got {beta}")
    if kind in ("robust", "exo_pair"):
        expected, right = "a number in [0, 0.5)", 0 <= label_smoothing < 0.5
    else:
        expected, right = "0", label_smoothing == 0
    if kind == "exo_pair":
        expected, right = "a number in (0, 0.5)", right and label_smoothing > 0
    if not right:
        raise ValueError(f'label_smoothing: expected {expected} for "{kind}", got {label_smoothing}')


def _robust(d: Tensor, beta: float, e: float) -> Tensor:
    return (e * F.logsigmoid(-beta * d) - (1 - e) * F.logsigmoid(beta * d)) / (1 - 2 * e)


def _exo_pair(d: Tensor, beta: float, e: float) -> Tensor:
    right, wrong = beta * d, -beta * d
    of_right = torch.sigmoid(right) * (F.logsigmoid(right) - math.log1p(-e))
    return of_right + torch.sigmoid(wrong) * (F.logsigmoid(wrong) - math.log(e))


_KINDS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "sigmoid": lambda d, beta, e: -F.logsigmoid(beta * d),
    "hinge": lambda d, beta, e: torch.relu(1 - beta * d),
    "ipo": lambda d, beta, e: (d - 1 / (2 * beta)) ** 2,
    "robust": _robust,
    "exo_pair": _exo_pair,
}
