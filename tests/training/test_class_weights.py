"""Losses in which classes have weights, against torch and scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastpeft.errors import UserError
from fastpeft.training.class_weights import check_weights, weighted_loss, weights_of

CLASSES = [0, 0, 0, 0, 1, 2, 2, 0]


def test_balanced_is_scikit_learns() -> None:
    import numpy

    utils = pytest.importorskip("sklearn.utils.class_weight")
    expected = utils.compute_class_weight("balanced", classes=numpy.array([0, 1, 2]), y=CLASSES)
    assert weights_of("balanced", "abc", CLASSES) == pytest.approx(list(expected))


def test_labels_that_are_left_out_have_weight_one() -> None:
    assert weights_of({"c": 3.0}, "abc", CLASSES) == [1.0, 1.0, 3.0]
    assert weights_of("balanced", "abcd", CLASSES)[3] == 1.0, "no row, no weight to speak of"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_torchs(smoothing: float) -> None:
    logits = torch.randn(8, 3, dtype=torch.float64).float().requires_grad_()
    labels, weights = torch.tensor(CLASSES), torch.tensor([0.5, 2.0, 1.0])
    ours = weighted_loss(weights.tolist(), smoothing)(SimpleNamespace(logits=logits), labels, num_items_in_batch=8)
    theirs = torch.nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing)(logits, labels)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    assert ours.item() == theirs.item() != torch.nn.functional.cross_entropy(logits, labels).item()


def test_batches_of_one_step_count_by_their_rows() -> None:
    logits, labels = torch.randn(8, 3), torch.tensor(CLASSES)
    loss = weighted_loss([0.5, 2.0, 1.0])
    whole = sum(
        loss(SimpleNamespace(logits=logits[part]), labels[part], num_items_in_batch=torch.tensor(8))
        for part in (slice(0, 2), slice(2, 8))
    )
    means = [loss(SimpleNamespace(logits=logits[part]), labels[part]) for part in (slice(0, 2), slice(2, 8))]
    assert whole == pytest.approx(0.25 * means[0].item() + 0.75 * means[1].item())


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"good": 2.0, "bat": 1.0}, "expected classes of good, bad, got 'bat', did you mean 'bad'?"),
        ({"good": 0.0}, "class_weights.good: expected a number above 0, got 0.0"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError) as found:
        check_weights(weights, ["good", "bad"])
    assert said in str(found.value)
