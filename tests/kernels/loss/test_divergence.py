"""Divergences by PyTorch's operations: the definition's values and gradients, and TRL's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import kl_divergence
from fastpeft_kernels.loss import rows as walking
from fastpeft_kernels.loss.divergence_reference import divergence_reference
from tests.budget import assert_within_budget

pytestmark = [pytest.mark.usefixtures("nan_filled"), pytest.mark.usefixtures("nothing_compiled_before")]

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
WORDS = 31

every_beta = pytest.mark.parametrize("beta", (0.0, 0.3, 1.0))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time."""
    monkeypatch.setattr(walking, "_PIECE", 2 * WORDS)


def draw(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor]:
    return (torch.randn(*lead, WORDS) * 2).to(dtype), (torch.randn(*lead, WORDS) * 2).to(dtype)


def derived(function: Any, student: Tensor, teacher: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    values = function(leaf, teacher, *arguments, **named)
    weights = torch.linspace(0.5, 2.0, values.numel(), dtype=values.dtype).view(values.shape)
    return values.detach(), torch.autograd.grad((values * weights).sum(), leaf)[0]


@every_beta
@pytest.mark.parametrize("dtype", (F32, BF16))
@pytest.mark.parametrize("temperature", (1.0, 2.5))
def test_within_budget(dtype: torch.dtype, temperature: float, beta: float) -> None:
    student, teacher = draw(dtype, 3, 5)
    ours = derived(kl_divergence, student, teacher, temperature, beta=beta, reduction="none")
    same = derived(divergence_reference, student, teacher, temperature, beta)
    exact = derived(divergence_reference, student.double(), teacher.double(), temperature, beta)
    for x, y, z, what in zip(ours, same, exact, ("values", "gradient"), strict=True):
        assert_within_budget(x, y, z, what)


@every_beta
def test_gradient_in_fp64(beta: float) -> None:
    student, teacher = draw(F64, 4)
    mask = torch.tensor([True, False, True, True])

    def values(x: Tensor) -> Tensor:
        return kl_divergence(x, teacher, 1.5, beta=beta, mask=mask, reduction="none")

    assert torch.autograd.gradcheck(values, student.requires_grad_())


@pytest.mark.full  # importing TRL takes long
@every_beta
def test_is_trls(beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    student, teacher = draw(F32, 2, 4)
    labels = torch.tensor([[-100, 3, 4, 5], [1, 2, -100, 9]])
    theirs = trainer.generalized_jsd_loss(student, teacher, labels, beta, 0.9)
    torch.testing.assert_close(kl_divergence(student, teacher, 0.9, beta=beta, mask=labels != -100), theirs)
    theirs = trainer.generalized_jsd_loss(student, teacher, labels, beta, 0.9, num_items_in_batch=11)
    ours = kl_divergence(student, teacher, 0.9, beta=beta, mask=labels != -100, num_items=11)
    torch.testing.assert_close(ours, theirs)


@every_beta
def test_extremes(beta: float) -> None:
    """Words that both mask; a row of NaN that is not counted; logits far from zero; equal distributions."""
    student, teacher = draw(F32, 5)
    student[0, ::2] = teacher[0, ::2] = -torch.inf
    student[1], teacher[1] = torch.nan, torch.inf
    student[2] += 3e3
    teacher[3] = student[3] - 7.0
    mask = torch.tensor([True, False, True, True, True])
    values, gradient = derived(kl_divergence, student, teacher, beta=beta, mask=mask, reduction="none")
    assert values[1] == 0 and not gradient[1].any()
    same = divergence_reference(student[2:], teacher[2:], 1.0, beta)
    exact = divergence_reference(student[2:].double(), teacher[2:].double(), 1.0, beta)
    assert_within_budget(values[2:], same, exact)
    assert values[3].abs() < 1e-6 and gradient[3].abs().max() < 1e-6
    torch.testing.assert_close(values[0], divergence_reference(student[0, 1::2], teacher[0, 1::2], 1.0, beta))
    assert gradient.isfinite().all() and not gradient[0, ::2].any()


def test_what_the_teacher_alone_excludes() -> None:
    """The forward direction is finite where q has what p has not; the reverse is not."""
    student, teacher = draw(F32, 1)
    teacher[0, 3] = -torch.inf
    assert kl_divergence(student, teacher, beta=0.0).isfinite()
    assert kl_divergence(student, teacher, beta=0.5).isfinite()
    assert kl_divergence(student, teacher, beta=1.0) == torch.inf


def test_reductions() -> None:
    student, teacher = draw(F32, 2, 3)
    values = kl_divergence(student, teacher, reduction="none")
    assert values.shape == (2, 3)
    torch.testing.assert_close(kl_divergence(student, teacher), values.mean())
    torch.testing.assert_close(kl_divergence(student, teacher, reduction="sum"), values.sum())
    assert kl_divergence(student, teacher, mask=torch.zeros(2, 3, dtype=torch.bool)) == 0.0
    assert kl_divergence(student[:0], teacher[:0]) == 0.0


def test_other_dtype_and_strides_of_the_teacher() -> None:
    student, teacher = draw(F32, 6)
    across = teacher.to(BF16).t().contiguous().t()
    ours = derived(kl_divergence, student, across, reduction="none")
    for x, y in zip(ours, derived(kl_divergence, student, across.float(), reduction="none"), strict=True):
        torch.testing.assert_close(x, y)


def test_one_graph() -> None:
    student, teacher = draw(F32, 2, 3)
    compiled = torch.compile(
        lambda x, y: kl_divergence(x, y, 2.0, beta=0.3, mask=y[..., 0] > 0), fullgraph=True, backend="aot_eager"
    )
    eager = derived(kl_divergence, student, teacher, 2.0, beta=0.3, mask=teacher[..., 0] > 0)
    torch.testing.assert_close(derived(compiled, student, teacher), eager)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_logits": torch.zeros(3, WORDS).long()}, TypeError, "student_logits: expected a floating tensor"),
        ({"teacher_logits": torch.zeros(3, 5)}, ValueError, "teacher_logits: expected the shape of student_logits"),
        ({"teacher_logits": torch.zeros(3, WORDS, requires_grad=True)}, ValueError, "teacher_logits: .* detach it"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ({"beta": 1.5}, ValueError, "beta: expected 0 <= beta <= 1, got 1.5"),
        ({"mask": torch.zeros(3)}, ValueError, r"mask: expected bool of shape \(3,\)"),
        ({"reduction": "batchmean"}, ValueError, "reduction: expected one of"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kl_divergence(**{"student_logits": torch.zeros(3, WORDS), "teacher_logits": torch.zeros(3, WORDS), **changes})
