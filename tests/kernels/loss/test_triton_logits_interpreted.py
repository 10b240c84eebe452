"""Losses of given logits by Triton's kernels, in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.loss import cross_entropy, kl_divergence
from fastpeft_kernels.loss.divergence_reference import divergence_reference
from tests.budget import assert_within_budget

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]

F32, F16 = torch.float32, torch.float16  # the interpreter computes bfloat16 wrongly
TOKENS, WORDS = 4, 27

every_beta = pytest.mark.parametrize("beta", (0.0, 0.3, 1.0))


def draw(dtype: torch.dtype) -> Tensor:
    """Rows with memory of others beside them."""
    return (torch.randn(TOKENS, WORDS + 5) * 2).to(dtype)[:, :WORDS]


@pytest.mark.parametrize("dtype", (F32, F16))
def test_cross_entropy(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    logits, labels = draw(dtype), torch.tensor([3, -100, 26, 0])
    logits[1] = torch.nan
    options = {"label_smoothing": 0.2, "class_weight": torch.rand(WORDS)}
    results = []
    for function, x in ((cross_entropy, logits), (None, logits), (None, logits.double())):
        leaf = x.clone().requires_grad_()
        if function is None:
            named = {"label_smoothing": 0.2, "weight": options["class_weight"].to(torch.promote_types(x.dtype, F32))}
            loss = F.cross_entropy(leaf.to(named["weight"].dtype)[labels != -100], labels[labels != -100], **named)
        else:
            loss = function(leaf, labels, **options, backend="triton")
        results.append((loss.detach(), torch.autograd.grad(loss * 3.0, leaf)[0]))
    for values, what in zip(zip(*results, strict=True), ("loss", "gradient"), strict=True):
        assert_within_budget(*values, what)
    assert not results[0][1][1].any()


@pytest.mark.parametrize(
    ("dtypes", "beta"), (((F32, F32), 0.3), ((F16, F32), 0.0), ((F16, F16), 1.0), ((F16, F16), 0.3))
)
def test_divergence(module: ModuleType, small: Any, dtypes: tuple[torch.dtype, torch.dtype], beta: float) -> None:
    student, teacher = (draw(dtype) for dtype in dtypes)
    counted, upstream = torch.tensor([True, True, False, True]), torch.tensor([1.0, 0.5, 0.0, -2.0])
    values, kept = torch.full((TOKENS,), torch.nan), torch.full((5, TOKENS), torch.nan)
    gradient = torch.full_like(student, torch.nan)
    module.divergence_triton(student, teacher, counted, 1.5, beta, values, kept, small)
    module.divergence_backward_triton(upstream, student, teacher, kept, 1.5, beta, gradient, small)
    results = [(values, gradient)]
    for wide in (False, True):
        leaf, other = ((x.double() if wide else x).clone() for x in (student, teacher))
        every = divergence_reference(leaf.requires_grad_(), other, 1.5, beta).where(counted, 0.0)
        results.append((every.detach(), torch.autograd.grad((every * upstream).sum(), leaf)[0]))
    for figures, what in zip(zip(*results, strict=True), ("values", "gradient"), strict=True):
        assert_within_budget(*figures, what)
    assert gradient._base is None or gradient._base[:, WORDS:].isnan().all()


@every_beta
def test_extremes(module: ModuleType, small: Any, beta: float) -> None:
    """Words that both mask; NaN in a row; logits far from zero that grow with every block; equal distributions."""
    student, teacher = draw(F32).clone(), draw(F32).clone()
    student[0, ::2] = teacher[0, ::2] = -torch.inf
    student[1, 20] = torch.nan
    student[2] += 3e3 + 9.0 * torch.arange(WORDS)
    teacher[2] -= 1.0 * torch.arange(WORDS)
    teacher[3] = student[3] - 7.0
    wanted = kl_divergence(student, teacher, beta=beta, reduction="none", backend="torch")
    sound = [0, 2, 3]
    values, kept = torch.full((TOKENS,), torch.nan), torch.full((5, TOKENS), torch.nan)
    gradient = torch.full_like(student, torch.nan)
    module.divergence_triton(student, teacher, None, 1.0, beta, values, kept, small)
    torch.testing.assert_close(values[sound], wanted[sound], rtol=1e-5, atol=1e-6)
    assert values[1].isnan()
    module.divergence_backward_triton(torch.ones(TOKENS), student, teacher, kept, 1.0, beta, gradient, small)
    leaf = student.clone().requires_grad_()
    kl_divergence(leaf, teacher, beta=beta, reduction="sum", backend="torch").backward()
    assert leaf.grad is not None
    torch.testing.assert_close(gradient[sound], leaf.grad[sound], rtol=1e-4, atol=1e-5)
    assert gradient[1].isnan().any()
