"""Losses of pairs of answers: TRL's numbers, and the log-probabilities of a head with its adapter off as reference."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import Head, dpo_loss, linear_cross_entropy
from fastpeft_kernels.weights import DenseWeight

KINDS = {"sigmoid": 0.0, "hinge": 0.0, "ipo": 0.0, "robust": 0.2, "exo_pair": 0.1}
every_kind = pytest.mark.parametrize("kind", KINDS)
PAIRS, TOKENS = 4, 6


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of labels, the policy's and the reference's, chosen answers first; which tokens are answers."""
    policy, reference = -3 * torch.rand(2, 2 * PAIRS, TOKENS, dtype=torch.float64)
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (2 * PAIRS, 1))
    return (policy * mask).requires_grad_(), reference * mask, mask


def ours(policy: Tensor, reference: Tensor, mask: Tensor, kind: str, beta: float) -> Any:
    tokens = mask.sum(1).chunk(2) if kind == "ipo" else (None, None)
    answers = (*policy.sum(1).chunk(2), *reference.sum(1).chunk(2))
    named = {"chosen_tokens": tokens[0], "rejected_tokens": tokens[1], "label_smoothing": KINDS[kind]}
    return dpo_loss(*answers, kind=kind, beta=beta, **named)


@pytest.mark.full  # importing TRL takes long
@every_kind
def test_is_trls(kind: str) -> None:
    """Its trainer's own method, over a model that answers with what was drawn."""
    trainer = pytest.importorskip("trl").DPOTrainer
    policy, reference, mask = drawn()
    before = torch.zeros(2 * PAIRS, 1, dtype=torch.bool)
    model = lambda **_: SimpleNamespace(log_probs=policy, loss=None, entropy=None)  # noqa: E731
    model.training = True
    it = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(device=torch.device("cpu")), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=0.3,
        label_smoothing=KINDS[kind], use_weighting=False,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros(2 * PAIRS, TOKENS + 1, dtype=torch.int64),
        "completion_mask": torch.cat([before, mask], 1).long(),
        "ref_chosen_logps": reference.sum(1)[:PAIRS],
        "ref_rejected_logps": reference.sum(1)[PAIRS:],
    }
    with pytest.raises((AttributeError, TypeError)) as stopped:  # by the figures to log, which the model has not
        trainer._compute_loss(it, model, inputs, return_outputs=False)
    theirs = next(entry.frame.f_locals["loss"] for entry in stopped.traceback if entry.name == "_compute_loss")
    found = ours(policy, reference, mask, kind, 0.3)
    torch.testing.assert_close(found.losses.mean(), theirs)
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (found.losses.mean(), theirs)]
    torch.testing.assert_close(*gradients)


@every_kind
def test_gradcheck(kind: str) -> None:
    policy, reference, mask = drawn()
    assert torch.autograd.gradcheck(lambda x: ours(x, reference, mask, kind, 0.3).losses, policy)


def test_by_hand() -> None:
    """Of one pair, d = 2 and beta = 0.5: each formula's value."""
    answers = [torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0)]
    ratio = 1 / (1 + math.exp(-1.0))
    found = {
        kind: dpo_loss(*answers, kind=kind, beta=0.5, label_smoothing=KINDS[kind]) for kind in KINDS if kind != "ipo"
    }
    right, wrong = torch.tensor(ratio).log(), torch.tensor(1 - ratio).log()
    torch.testing.assert_close(found["sigmoid"].losses[0], -right)
    torch.testing.assert_close(found["hinge"].losses[0], torch.tensor(0.0))
    torch.testing.assert_close(found["robust"].losses[0], (0.2 * wrong - 0.8 * right) / 0.6)
    kl = ratio * (right - torch.tensor(0.9).log()) + (1 - ratio) * (wrong - torch.tensor(0.1).log())
    torch.testing.assert_close(found["exo_pair"].losses[0], kl)
    counts = {"chosen_tokens": torch.tensor([2]), "rejected_tokens": torch.tensor([4])}
    ipo = dpo_loss(*answers, kind="ipo", beta=0.5, **counts).losses[0]
    torch.testing.assert_close(ipo, torch.tensor((1 / 2 + 1 / 4 - 1.0) ** 2))
    assert found["sigmoid"].chosen_rewards == 0.5 and found["sigmoid"].rejected_rewards == -0.5


def test_from_hidden_states_with_the_adapter_off_as_reference() -> None:
    """A low-rank update that is zero is the reference itself; one that is not gets the gradient of the definition."""
    hidden, weight = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    labels = torch.randint(0, 11, (2, 5))
    a, b = torch.randn(3, 8, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64, requires_grad=True)

    def answers(head: Head) -> tuple[Tensor, Tensor]:
        log_probs = linear_cross_entropy(hidden, head, labels, log_probs=True).log_probs
        assert log_probs is not None
        return log_probs.sum(1).split(1)  # type: ignore[return-value]

    frozen = DenseWeight(weight)
    with torch.no_grad():
        off = answers(Head(frozen))
    assert dpo_loss(*off, *off).losses == torch.log(torch.tensor(2.0, dtype=torch.float64))
    on = answers(Head(frozen, s=hidden @ a.t(), b=b))
    plain = (hidden @ (weight + b @ a).t()).log_softmax(-1).gather(-1, labels[..., None])[..., 0].sum(1).split(1)
    gradients = [torch.autograd.grad(dpo_loss(*x, *off).losses.sum(), b)[0] for x in (on, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "dpo"}, ValueError, "kind: expected one of"),
        ({"beta": 0.0}, ValueError, "beta: expected a number > 0, got 0.0"),
        ({"label_smoothing": 0.1}, ValueError, 'label_smoothing: expected 0 for "sigmoid", got 0.1'),
        ({"kind": "exo_pair"}, ValueError, r'label_smoothing: expected a number in \(0, 0.5\) for "exo_pair", got 0'),
        ({"kind": "robust", "label_smoothing": 0.5}, ValueError, r"label_smoothing: expected a number in \[0, 0.5\)"),
        ({"kind": "ipo"}, ValueError, 'chosen_tokens: expected the number of tokens for "ipo".*got None'),
        ({"chosen_tokens": torch.ones(3)}, ValueError, "chosen_tokens: .* None for others, got some"),
        ({"rejected": torch.zeros(2)}, ValueError, r"rejected: expected shape \(3,\), got \(2,\)"),
        ({"reference_chosen": torch.zeros(3, requires_grad=True)}, ValueError, "reference_chosen: .* detach it"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    with pytest.raises(error, match=message):
        dpo_loss(**{name: torch.zeros(3) for name in names} | changes)
