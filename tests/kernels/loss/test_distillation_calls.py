"""Distillation without logits in one graph, under autocast and on no device, and what it allocates and multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import Head, Teacher, TopLogits
from fastpeft_kernels.loss.blocks import choose_whole_rows
from fastpeft_kernels.weights import DenseWeight
from tests.kernels.compiling import check_one_graph, check_selective_checkpointing

from .distillations import Distillation, make, shrink_blocks
from .test_linear_memory import Watched

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

CASES: dict[str, dict[str, Any]] = {
    "frozen": {"teacher": "four_bit", "ways": "mixed_with_labels", "storage": "four_bit", "rank": 2},
    "trained": {"teacher": "wider", "ways": "reverse", "frozen": False, "rank": 2, "bias": True},
    "top": {"teacher": "top", "ways": "with_labels", "frozen": False},
}
every_case = pytest.mark.parametrize("name", CASES)
TOKENS, WORDS, FEATURES = 300, 3000, 16


def losses(case: Distillation, hidden: Tensor, **more: Any) -> Tensor:
    case.student.tensors["hidden"] = hidden
    return case.call(**more).loss


def parameters(case: Distillation) -> list[Tensor]:
    return [x for name, x in case.student.tensors.items() if x.requires_grad and name != "hidden"]


@pytest.mark.parametrize("name", ("frozen", "top", pytest.param("trained", marks=pytest.mark.full)))
def test_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_blocks(monkeypatch)
    case = make(9, dtype=torch.float32, ignored=0.0, **CASES[name])
    # Without a reduction no logits are kept, which the op never does; made once more they may round differently.
    check_one_graph(
        lambda x: (losses(case, x, reduction="none"),), case.student.tensors["hidden"], parameters(case), "aot_eager"
    )


@pytest.mark.parametrize("frozen", (True, pytest.param(False, marks=pytest.mark.full)))
def test_tokens_that_do_not_count_in_one_graph(frozen: bool) -> None:
    """They are computed there, and count for nothing; NaN times zero stays NaN in a sum over tokens, a weight's."""
    case = make(3, 5, dtype=torch.float32, ways="mixed_with_labels", ignored=0.5, frozen=frozen)
    x = case.student.tensors["hidden"].detach()
    x[case.student.labels == -100] = torch.nan if frozen else 1e3
    x.requires_grad_()
    function = torch.compile(lambda x: losses(case, x), fullgraph=True, backend="aot_eager")
    traced, eager = function(x), losses(case, x)
    torch.testing.assert_close(traced, eager)
    wanted = [x, *parameters(case)]
    torch.testing.assert_close(torch.autograd.grad(traced, wanted), torch.autograd.grad(eager, wanted))


@pytest.mark.full
@every_case
def test_selective_checkpointing(name: str) -> None:
    case = make(9, dtype=torch.float32, ignored=0.0, **CASES[name])
    for saved in ("mm", "everything"):
        check_selective_checkpointing(
            lambda x: losses(case, x), case.student.tensors["hidden"], parameters(case), saved
        )  # fmt: skip


@pytest.mark.parametrize("top", (True, False))
def test_meta(top: bool) -> None:
    hidden = torch.empty(2, 5, 8, device="meta", requires_grad=True)
    weight = torch.empty(11, 8, device="meta", requires_grad=True)
    teacher: Teacher | TopLogits = Teacher(hidden.detach(), Head(DenseWeight(weight.detach())))
    if top:
        teacher = TopLogits(hidden.detach(), torch.empty(2, 5, 8, dtype=torch.int64, device="meta"))
    student = make(2, 5, dtype=torch.float32).student
    student.tensors, student.stored = {"hidden": hidden, "weight": weight}, None
    student.labels = student.labels.to("meta")
    loss = Distillation(student, teacher, {"cross_entropy_weight": 1.0}).call().loss
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == () and [x.shape for x in gradients] == [hidden.shape, weight.shape]


@pytest.mark.parametrize("frozen", (True, False))
def test_autocast(frozen: bool) -> None:
    """Products in autocast's dtype, or what the CPU makes of it; fp32 parameters get fp32 gradients."""
    case = make(9, dtype=torch.float32, frozen=frozen, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.call().loss
    exact = case.call().loss
    assert loss.dtype == torch.float32 and (loss - exact).abs() < 0.05 * exact
    wanted = [x for x in case.student.tensors.values() if x.requires_grad]
    assert {gradient.dtype for gradient in torch.autograd.grad(loss, wanted)} == {torch.float32}


@every_case
def test_backward_twice(name: str) -> None:
    case = make(9, dtype=torch.float32, **CASES[name])
    wanted = [x for x in case.student.tensors.values() if x.requires_grad]
    loss = case.call().loss
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    kept = [x.clone() for x in first]
    torch.testing.assert_close(torch.autograd.grad(2 * loss, wanted), tuple(2 * x for x in kept))
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)


def test_a_teacher_that_changes_before_backward() -> None:
    """A frozen student does not look at it again; a trained one does."""
    for frozen in (True, False):
        case = make(5, dtype=torch.float32, frozen=frozen)
        assert isinstance(case.teacher, Teacher) and isinstance(case.teacher.head.weight, DenseWeight)
        loss = case.call().loss
        case.teacher.head.weight.ready(torch.float32).mul_(2.0)  # type: ignore[union-attr]
        if frozen:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match=r"changed|written"):
                loss.backward()


def large(**more: Any) -> Distillation:
    return make(TOKENS, features=FEATURES, words=WORDS, dtype=torch.float32, ignored=0.0, **more)


@pytest.mark.parametrize(
    "products, head",
    (
        (3, {}),
        (3, {"ways": "mixed_with_labels"}),
        (
            6 - 2 * FEATURES / TOKENS,
            {"frozen": False},
        ),  # the gradients in the logits of as many tokens as there are features are kept
        (5 - 2 * FEATURES / TOKENS, {"frozen": False, "bias": True, "hidden_trained": False}),
        (2, {"hidden_trained": False}),
        (2, {"teacher": "top"}),
        (4 - FEATURES / TOKENS, {"teacher": "top", "frozen": False}),
    ),
)
def test_how_many_products(products: float, head: dict[str, Any]) -> None:
    """Each of tokens x words x features, forward and backward."""
    case = large(**head)
    with Watched() as found:
        loss = case.call().loss
        if loss.requires_grad:
            loss.sum().backward()
    assert found.multiplications == round(products * TOKENS * WORDS * FEATURES)


@pytest.mark.parametrize("head", ({}, {"frozen": False, "ways": "mixed_with_labels"}, {"teacher": "top"}))
def test_nothing_of_tokens_by_words(monkeypatch: pytest.MonkeyPatch, head: dict[str, Any]) -> None:
    """The largest tensor is a block of 64 tokens under all words, or the weight's gradient."""
    monkeypatch.setattr("fastpeft_kernels.loss.blocks._WHOLE_ROWS_ON_CPU", (0, 64))
    case = large(**head)
    with Watched() as found:
        case.call().loss.backward()
    assert found.largest <= max(4 * 64 * (WORDS + 1), 4 * 512 * 1024) < 4 * TOKENS * WORDS


def test_whole_rows_on_a_gpu() -> None:
    """At 8192 tokens in bf16: 256 MB, where 512 tokens or more fit there."""
    for words, tokens in ((32_000, 2048), (128_256, 512), (262_144, 512)):
        found = choose_whole_rows(8192, words, 4 * words, torch.device("cuda"), decoded=True)
        assert found.tokens == tokens and found.words == 8192
