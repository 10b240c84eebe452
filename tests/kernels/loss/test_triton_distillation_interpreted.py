"""A divergence from a teacher with the maps of both heads and a loss of labels, by Triton's kernels, interpreted."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import divergence_op
from fastpeft_kernels.loss import statistics as statistics_of_logits
from fastpeft_kernels.loss.distillation_reference import distillation_reference
from fastpeft_kernels.loss.divergence_op import KEPT
from fastpeft_kernels.loss.hard_labels import HardLabels
from fastpeft_kernels.loss.logit_map import PLAIN, LogitMap
from fastpeft_kernels.loss.statistics import statistics
from tests.budget import assert_within_budget

from .distillations import hold_distillation, make, shrink_blocks

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]

F32, F16 = torch.float32, torch.float16  # the interpreter computes bfloat16 wrongly
TOKENS, WORDS, TEMPERATURE = 4, 43, 1.5


def draw(dtype: torch.dtype) -> Tensor:
    """Rows with memory of others beside them."""
    return (torch.randn(TOKENS, WORDS + 5) * 2).to(dtype)[:, :WORDS]


def definition(
    student: Tensor, teacher: Tensor, labels: Tensor, maps: tuple[LogitMap, ...], ways: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, nll, the gradient of all losses in student), of raw logits of the dtype that it is to be in."""
    leaf = student.clone().requires_grad_()
    logits = [_logits(x.to(torch.promote_types(x.dtype, F32)), of) for x, of in zip((leaf, teacher), maps, strict=True)]
    losses, divergence, nll = distillation_reference(*logits, labels, temperature=TEMPERATURE, **ways)
    return divergence.detach(), nll.detach(), torch.autograd.grad(losses.sum() / maps[0].scale, leaf)[0]


def _logits(raw: Tensor, of: LogitMap) -> Tensor:
    z = (raw if of.bias is None else raw + of.bias.to(raw.dtype)) * of.scale
    return z if of.softcap is None else of.softcap * torch.tanh(z / of.softcap)


@pytest.mark.parametrize(
    "dtypes, beta",
    [
        ((F32, F32), 0.3),
        ((F16, F32), 0.0),
        *(pytest.param(*case, marks=pytest.mark.full) for case in [((F32, F32), 1.0), ((F16, F16), 0.3)]),
    ],
)
def test_with_maps_and_labels(
    module: ModuleType, small: Any, dtypes: tuple[torch.dtype, torch.dtype], beta: float
) -> None:
    """In place, and a chunk of words at a time; the second token does not count, and its student is NaN."""
    student, teacher = (draw(dtype) for dtype in dtypes)
    maps = (LogitMap(torch.randn(WORDS), 0.7, 3.0), LogitMap(torch.randn(WORDS), 1.2, None))
    labels = torch.randint(0, WORDS, (TOKENS,))
    counted = torch.arange(TOKENS) != 1
    factors = {"divergence_weight": 0.6, "cross_entropy_weight": 0.8}
    safe = torch.where(counted, labels, -100)
    want = [
        definition(x, y, safe, maps, factors | {"beta": beta})
        for x, y in ((student, teacher), (student.double(), teacher.double()))
    ]
    student[1] = torch.nan
    values, known = torch.full((TOKENS,), torch.nan), torch.full((KEPT + 3, TOKENS + 2), torch.nan)[:, :TOKENS]
    kept = torch.full((KEPT, TOKENS), torch.nan)
    module.divergence_triton(
        student, teacher, counted, TEMPERATURE, beta, values, kept, small, student_map=maps[0], teacher_map=maps[1]
    )
    found = statistics(student, labels, -1, None, False, "triton", maps[0])
    known[:KEPT], known[KEPT:] = kept, torch.stack([found.top, found.inverse, found.others])
    d_values, d_nll = (counted * weight for weight in factors.values())
    for first, last in ((0, 21), (21, WORDS)):
        place = slice(first, last)
        of_chunk = [of._replace(bias=None if of.bias is None else of.bias[place]) for of in maps]
        top, inverse, others = known[KEPT:]
        module.divergence_backward_triton(
            d_values, student[:, place], teacher[:, place], known[:KEPT], TEMPERATURE, beta, student[:, place], small,
            student_map=of_chunk[0], teacher_map=of_chunk[1],
            hard=HardLabels(first, labels, top, inverse, others, d_nll),
        )  # fmt: skip
    for ours, same, exact, what in zip(
        (values, found.nll[counted], student), *want, ("divergence", "nll", "gradient"), strict=True
    ):
        if what == "nll":
            same, exact = same[counted], exact[counted]
        assert_within_budget(ours, same, exact, what)
    assert not student[1].any() and student._base is not None


@pytest.mark.parametrize("beta", (pytest.param(0.0, marks=pytest.mark.full), 0.4))
def test_words_that_the_teacher_does_not_name(module: ModuleType, small: Any, beta: float) -> None:
    """Whole lanes and blocks of them have -inf, as where its largest logits alone are stored."""
    student, teacher = draw(F32), torch.full((TOKENS, WORDS), -torch.inf)
    words = torch.rand(TOKENS, WORDS).argsort(-1)[:, :2]
    teacher.scatter_(1, words, torch.randn(TOKENS, 2))
    labels, plain = torch.zeros(TOKENS, dtype=torch.int64), (PLAIN, PLAIN)
    ways = {"beta": beta, "divergence_weight": 1.0}
    want = [
        definition(x, y, labels, plain, ways) for x, y in ((student, teacher), (student.double(), teacher.double()))
    ]
    values, kept = torch.full((TOKENS,), torch.nan), torch.full((KEPT, TOKENS), torch.nan)
    gradient = torch.full_like(student, torch.nan)
    module.divergence_triton(student, teacher, None, TEMPERATURE, beta, values, kept, small)
    module.divergence_backward_triton(torch.ones(TOKENS), student, teacher, kept, TEMPERATURE, beta, gradient, small)
    assert_within_budget(values, want[0][0], want[1][0], "divergence")
    assert_within_budget(gradient, want[0][2], want[1][2], "gradient")


@pytest.mark.parametrize("frozen", (True, pytest.param(False, marks=pytest.mark.full)))
def test_the_whole_op(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    """Forward in place of whole rows, backward a chunk at a time, on these kernels."""
    pytest.importorskip("triton")
    shrink_blocks(monkeypatch)
    for module in (divergence_op, statistics_of_logits):
        monkeypatch.setattr(module, "logits_backend", lambda *_: "triton")
    hold_distillation(
        make(
            9, teacher="wider", ways="mixed_with_labels", dtype=F32, frozen=frozen, bias=True, softcap=3.0, ignored=0.3
        )
    )
