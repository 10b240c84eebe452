"""Distillation without logits: the definition's numbers, whatever heads, teacher, divergence and sizes."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.loss import Head, Teacher, TopLogits, kl_divergence, linear_cross_entropy, linear_distillation
from fastpeft_kernels.loss.reference import logits_reference
from fastpeft_kernels.weights import DenseWeight

from .distillations import TEACHERS, WAYS, Distillation, hold_distillation, make, shrink_blocks
from .heads import HEADS

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)


pytestmark = pytest.mark.usefixtures("nan_filled")


def possible(teacher: str, ways: str) -> bool:
    return teacher != "top" or WAYS[ways].get("beta") != 1.0


def sizes_of(head: str, teacher: str, features: int = 16, words: int = 24) -> dict[str, int]:
    """4-bit weights are stored 64 numbers at a time."""
    four_bit = HEADS[head].get("storage") == "four_bit" or teacher == "four_bit"
    return {} if four_bit else {"features": features, "words": words}


def exact(case: Distillation) -> None:
    """In fp64 nothing but the last digits may differ."""
    upstream = torch.randn(case.student.labels.shape)
    ours, want = case.results(case.call(reduction="none"), upstream), case.results(case.definition(), upstream)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-11)


@st.composite
def cases(draw: st.DrawFn) -> Distillation:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    teacher, ways = draw(st.sampled_from([pair for pair in product(TEACHERS, WAYS) if possible(*pair)]))
    head = draw(st.sampled_from(sorted(HEADS)))
    lead = draw(st.sampled_from([(1,), (2, 3), (11,), (4, 1, 2)]))
    sizes = sizes_of(head, teacher, draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 7, 14, 23, 90])))
    more = {"ignored": draw(st.sampled_from([0.0, 0.3, 0.8])), "softcap": draw(st.sampled_from([None, 3.0]))}
    return make(*lead, teacher=teacher, ways=ways, dtype=F64, **more, **sizes, **HEADS[head])


@settings(max_examples=15)
@given(case=cases())
def test_drawn(case: Distillation) -> None:
    exact(case)


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str) -> None:
    sizes = sizes_of(head, "wider", words=40)
    hold_distillation(make(61, teacher="wider", ways="mixed_with_labels", dtype=BF16, **sizes, **HEADS[head]))


@pytest.mark.parametrize("dtype", (pytest.param(F32, marks=pytest.mark.full), BF16))
@pytest.mark.parametrize("teacher, ways", [pair for pair in product(TEACHERS, WAYS) if possible(*pair)])
def test_every_teacher_and_way(teacher: str, ways: str, dtype: torch.dtype) -> None:
    sizes = sizes_of("low_rank", teacher, words=40)
    # Of few numbers the largest error is chance, in 16 bits where the CPU multiplies these itself.
    hold_distillation(make(16, 20, teacher=teacher, ways=ways, dtype=dtype, softcap=3.0, rank=3, **sizes))


@pytest.mark.full
@pytest.mark.parametrize("head, teacher, ways", [x for x in product(HEADS, TEACHERS, WAYS) if possible(*x[1:])])
def test_every_combination(head: str, teacher: str, ways: str) -> None:
    sizes = sizes_of(head, teacher)
    exact(make(11, teacher=teacher, ways=ways, dtype=F64, **sizes, **HEADS[head]))
    for dtype in (BF16, torch.float16):  # in fp32 the largest error of so few numbers is chance, one time in 200
        hold_distillation(make(200, teacher=teacher, ways=ways, dtype=dtype, **sizes, **HEADS[head]))


@pytest.mark.parametrize("frozen", (True, False))
def test_gradcheck(frozen: bool) -> None:
    case = make(5, features=3, words=9, ways="mixed_with_labels", dtype=F64, rank=2, bias=True, frozen=frozen)
    tensors = case.student.tensors
    names = [name for name, x in tensors.items() if x.requires_grad]

    def losses(*changed: Tensor) -> Tensor:
        case.student.tensors = {**tensors, **dict(zip(names, changed, strict=True))}
        return case.call(reduction="none").loss

    assert torch.autograd.gradcheck(losses, [tensors[name] for name in names])


@pytest.mark.parametrize("beta", (0.0, 0.3, 1.0))
def test_is_the_divergence_of_logits_and_the_cross_entropy(beta: float) -> None:
    case = make(9, dtype=F32, ignored=0.3)
    assert isinstance(case.teacher, Teacher)
    hidden, head, labels = case.student.tensors["hidden"], case.student.head(), case.student.labels
    of_both = logits_reference(hidden, head), logits_reference(case.teacher.hidden, case.teacher.head)
    divergence = kl_divergence(*of_both, 0.9, beta=beta, mask=labels != -100)
    cross_entropy = linear_cross_entropy(hidden, head, labels).loss
    out = case.call(beta=beta, temperature=0.9, divergence_weight=0.3, cross_entropy_weight=0.6)
    torch.testing.assert_close(out.loss, 0.3 * divergence + 0.6 * cross_entropy)


@pytest.mark.full  # importing TRL takes long
@pytest.mark.parametrize("beta", (0.0, 0.3, 1.0))
def test_is_trls(beta: float) -> None:
    theirs = pytest.importorskip("trl.trainer.distillation_trainer")._chunked_divergence_loss
    case = make(3, 5, teacher="wider", dtype=F32, frozen=False)
    assert isinstance(case.teacher, Teacher) and isinstance(case.teacher.head.weight, DenseWeight)
    tensors, mask, of = case.student.tensors, case.student.labels != -100, case.teacher.head
    out = theirs(
        tensors["hidden"], case.teacher.hidden, tensors["weight"], of.weight.decode(dtype=F32), mask, beta,
        teacher_lm_head_bias=of.bias, teacher_logit_scale=of.scale, teacher_final_logit_softcapping=of.softcap,
        temperature=1.7,
    )[0]  # fmt: skip
    ours = case.call(beta=beta, temperature=1.7).loss
    torch.testing.assert_close(ours, out)
    wanted = (tensors["hidden"], tensors["weight"])
    torch.testing.assert_close(torch.autograd.grad(ours, wanted), torch.autograd.grad(out, wanted))


def test_all_logits_given_are_those_of_the_head() -> None:
    case = make(6, dtype=F64, ways="mixed")
    assert isinstance(case.teacher, Teacher)
    logits = logits_reference(case.teacher.hidden, case.teacher.head)
    words = torch.argsort(torch.randn(logits.shape), -1)
    out = Distillation(case.student, TopLogits(logits.gather(-1, words) - 3.0, words), case.ways).call()
    torch.testing.assert_close(out.loss, case.call().loss)


def test_reductions() -> None:
    case = make(2, 5, ways="with_labels", dtype=F32)
    every, counted = case.call(reduction="none"), case.student.labels != -100
    assert every.loss.shape == every.divergence.shape == (2, 5) and not every.loss[~counted].any()
    assert not every.divergence.requires_grad and every.nll is not None and not every.nll.requires_grad
    torch.testing.assert_close(case.call().loss, every.loss.sum() / counted.sum())
    torch.testing.assert_close(case.call(reduction="sum").loss, every.loss.sum())
    torch.testing.assert_close(case.call(num_items=torch.tensor(7)).loss, every.loss.sum() / 7)
    mask = torch.rand(2, 5) < 0.5
    torch.testing.assert_close(case.call(reduction="none", mask=mask).loss, every.loss.where(mask, 0.0))
    assert case.call(labels=None, cross_entropy_weight=0.0).nll is None


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_nothing_counted(dtype: torch.dtype) -> None:
    case = make(3, ways="with_labels", dtype=dtype, ignored=1.1, frozen=False)
    loss = case.call().loss
    assert loss == 0.0
    wanted = [x for x in case.student.tensors.values() if x.requires_grad]
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, wanted))
    assert make(0, dtype=F32).call().loss == 0.0


@pytest.mark.parametrize("frozen", (True, False))
def test_whatever_tokens_hold_that_are_not_counted(frozen: bool) -> None:
    case = make(9, ways="mixed_with_labels", dtype=F32, ignored=0.5, frozen=frozen)
    assert isinstance(case.teacher, Teacher)
    wanted = [x for x in case.student.tensors.values() if x.requires_grad]
    want = torch.autograd.grad(case.call().loss, wanted)
    with torch.no_grad():
        case.student.tensors["hidden"][case.student.labels == -100] = torch.nan
        case.teacher.hidden[case.student.labels == -100] = torch.inf
    assert torch.isfinite(case.call().loss)
    torch.testing.assert_close(torch.autograd.grad(case.call().loss, wanted), want)


def test_a_student_that_is_its_teacher() -> None:
    """The loss is zero to the last digits, also where one word has nearly all probability."""
    hidden, weight = torch.randn(7, 16, requires_grad=True), DenseWeight(torch.randn(24, 16) * 3)
    for beta in (0.0, 0.5, 1.0):
        loss = linear_distillation(hidden, Head(weight), Teacher(hidden.detach(), Head(weight)), beta=beta).loss
        assert loss.abs() < 1e-6 and torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6


def _arguments(**changes: Any) -> dict[str, Any]:
    hidden, weight = torch.zeros(3, 4), DenseWeight(torch.zeros(6, 4))
    teacher = Teacher(torch.zeros(3, 8), Head(DenseWeight(torch.zeros(6, 8))))
    return {"hidden": hidden, "head": Head(weight), "teacher": teacher} | changes


def _top(k: int = 2, words: list[int] | None = None, dtype: torch.dtype = torch.int64) -> TopLogits:
    return TopLogits(torch.zeros(3, k), torch.tensor([words or list(range(k))] * 3).to(dtype))


OTHER_WORDS = Teacher(torch.zeros(3, 8), Head(DenseWeight(torch.zeros(7, 8))))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": OTHER_WORDS}, ValueError, "teacher.head.weight: expected the student's 6 words, got 7"),
        ({"teacher": torch.zeros(3, 6)}, TypeError, "teacher: expected a Teacher or TopLogits, got Tensor"),
        ({"teacher": Teacher(torch.zeros(2, 8), OTHER_WORDS.head)}, ValueError, r"teacher.hidden: expected shape \(3"),
        (
            {"teacher": Teacher(torch.zeros(3, 8, requires_grad=True), OTHER_WORDS.head)},
            ValueError,
            "teacher.hidden: .* detach it",
        ),
        ({"teacher": Teacher(torch.zeros(3, 5), OTHER_WORDS.head)}, ValueError, "teacher.head.weight: expected shape"),
        ({"teacher": _top(7)}, ValueError, "teacher.logits: expected between 1 and 6 words a token, got 7"),
        ({"teacher": _top(2, [1, 6])}, ValueError, "teacher.words: expected 0 <= word < 6.*got 6"),
        ({"teacher": _top(2, [1, 1])}, ValueError, "teacher.words: expected distinct words"),
        ({"teacher": _top(dtype=torch.int32)}, TypeError, "teacher.words: expected torch.int64"),
        ({"teacher": _top(), "beta": 1.0}, ValueError, "beta: expected beta < 1"),
        ({"teacher": TopLogits(torch.zeros(3, 2), torch.zeros(3, 1).long())}, ValueError, "teacher.words: .* shape"),
        ({"beta": -0.1}, ValueError, "beta: expected 0 <= beta <= 1, got -0.1"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
        ({"divergence_weight": -1.0}, ValueError, "divergence_weight: expected a number >= 0, got -1.0"),
        ({"cross_entropy_weight": "1"}, TypeError, "cross_entropy_weight: expected a number, got str"),
        ({"cross_entropy_weight": 0.5}, ValueError, "labels: expected labels with cross_entropy_weight 0.5, got None"),
        ({"labels": torch.full((3,), 6)}, ValueError, "labels: expected ignore_index"),
        ({"mask": torch.zeros(3)}, ValueError, r"mask: expected bool of shape \(3,\)"),
        ({"reduction": "batchmean"}, ValueError, "reduction: expected one of"),
        ({"hidden": torch.zeros(3, 4).long()}, TypeError, "hidden: expected a floating tensor"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_distillation(**_arguments(**changes))
