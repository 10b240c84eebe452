"""Gradients of a trained head: logits that wait in the memory of the weight's gradient, and sums over many blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft_kernels.common.device import product_dtype
from fastpeft_kernels.loss import Head, blocks, distillation_call, linear_cross_entropy
from fastpeft_kernels.loss.kept_logits import KeptLogits
from fastpeft_kernels.weights import DenseWeight
from tests.budget import assert_within_budget

from .distillations import make as make_distillation
from .heads import Case, hold, make_case

pytestmark = pytest.mark.usefixtures("nan_filled")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

Rooms = list[tuple[torch.Size, int]]


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Rooms:
    """Shape and address of the memories that calls took for logits."""
    made: Rooms = []
    room = KeptLogits.room

    def noted(*args: Any) -> Tensor | None:
        found = room(*args)
        if found is not None:
            made.append((found.shape, found.data_ptr()))
        return found

    monkeypatch.setattr(KeptLogits, "room", staticmethod(noted))
    return made


def gradients(case: Case, loss: Tensor, **more: Any) -> dict[str, Tensor]:
    wanted = {name: x for name, x in case.tensors.items() if x.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), **more), strict=True))


@pytest.mark.parametrize("chunk", (pytest.param((4, 7), marks=pytest.mark.full), (9, 64), (512, 1024)))
@pytest.mark.parametrize("tokens, features", ((30, 16), (9, 16), (16, 16), (40, 7)))
def test_with_kept_logits_and_without(
    tokens: int, features: int, chunk: tuple[int, int], rooms: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than there is room for, fewer, as many; in several chunks and in one."""
    monkeypatch.setattr(blocks, "_ON_CPU", chunk)
    case = make_case(tokens, features=features, words=150, dtype=F64, frozen=False, rank=2, bias=True, softcap=3.0)
    kept = gradients(case, case.call(reduction="sum").loss)
    assert len(rooms) == 1 and rooms[0][0] == (150, features)
    made_again = gradients(case, case.call(reduction="none").loss.sum())
    assert len(rooms) == 1
    torch.testing.assert_close(kept, made_again, rtol=1e-10, atol=1e-12)


def test_chunks_of_forward_and_backward_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(12, features=9, words=150, dtype=F64, frozen=False)
    want = gradients(case, case.call(reduction="none").loss.sum())
    for forward_words, backward_words in ((64, 24), (24, 64), (150, 24), (24, 150)):
        found = (blocks.Blocks(5, forward_words), blocks.Blocks(7, backward_words))
        monkeypatch.setattr("fastpeft_kernels.loss.forward.choose_blocks", lambda *_, found=found: found[0])
        monkeypatch.setattr("fastpeft_kernels.loss.recompute.choose_chunks", lambda *_, found=found: found[1])
        torch.testing.assert_close(gradients(case, case.call(reduction="sum").loss), want, rtol=1e-10, atol=1e-12)


def test_a_second_pass_and_another_reader(rooms: Rooms) -> None:
    """What a kept graph needs again is left alone, and the gradients of the first pass too."""
    case = make_case(30, words=150, frozen=False)
    loss = case.call().loss
    first = gradients(case, loss, retain_graph=True)
    copies = {name: x.clone() for name, x in first.items()}
    second = gradients(case, loss)
    assert second["weight"].data_ptr() == rooms[0][1] != first["weight"].data_ptr()
    for name, x in copies.items():
        assert torch.equal(first[name], x) and torch.equal(second[name], x)


def test_the_gradient_takes_no_other_memory(rooms: Rooms) -> None:
    weight = nn.Parameter(torch.randn(150, 16))
    hidden, labels = torch.randn(30, 16, requires_grad=True), torch.randint(0, 150, (30,))
    linear_cross_entropy(hidden, Head(weight), labels).loss.backward()
    assert weight.grad is not None and weight.grad.data_ptr() == rooms[0][1]


def test_where_saved_tensors_are_moved_nothing_is_kept(rooms: Rooms) -> None:
    """It would lie beside what hooks bring elsewhere, or checkpointing makes again."""
    case = make_case(30, words=150, frozen=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = case.call().loss
    want = gradients(case, case.call(reduction="none").loss.sum() / (case.labels >= 0).sum())
    torch.testing.assert_close(gradients(case, loss), want)
    assert not rooms


def test_of_many_losses_before_one_backward_one_keeps_logits(rooms: Rooms) -> None:
    case = make_case(30, words=150, frozen=False)
    losses = [case.call().loss for _ in range(3)]
    want = gradients(case, case.call(reduction="none").loss.sum() / (case.labels >= 0).sum())
    assert len(rooms) == 1
    torch.testing.assert_close(gradients(case, sum(losses) / 3), want)
    case.call()
    assert len(rooms) == 2


def test_tied_embeddings(rooms: Rooms) -> None:
    """Both gradients of one parameter, in two steps without setting them to zero."""
    exact = nn.Parameter(torch.randn(150, 16, dtype=F64))
    weight = nn.Parameter(exact.detach().float())
    for _ in range(2):
        tokens = torch.randint(0, 150, (30,))
        linear_cross_entropy(F.embedding(tokens, weight).tanh(), Head(weight), tokens.roll(-1)).loss.backward()
        F.cross_entropy(F.embedding(tokens, exact).tanh() @ exact.t(), tokens.roll(-1)).backward()
    assert weight.grad is not None and exact.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", ({"log_probs": True}, {"reduction": "none"}))
def test_calls_that_may_be_many_keep_nothing(kept: dict[str, Any], rooms: Rooms) -> None:
    """Trainers that sum up losses of many calls would hold that memory once for each."""
    case = make_case(30, words=150, frozen=False)
    gradients(case, case.call(**kept).loss.sum())
    assert not rooms


@pytest.mark.parametrize("teacher", ("wider", "top"))
def test_a_distilled_head(teacher: str, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_CPU", (8, 20))
    monkeypatch.setattr(blocks, "_WHOLE_ROWS_ON_CPU", (0, 7))
    case = make_distillation(30, teacher=teacher, ways="mixed_with_labels", words=150, dtype=F64, frozen=False)
    kept = gradients(case.student, case.call(reduction="sum").loss, retain_graph=True)
    made_again = gradients(case.student, case.call(reduction="none").loss.sum())
    assert len(rooms) == 1
    torch.testing.assert_close(kept, made_again, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", (BF16, F16))
@pytest.mark.parametrize("ways", ("forward", "mixed_with_labels"))
def test_a_distilled_head_in_16_bits(ways: str, dtype: torch.dtype, rooms: Rooms) -> None:
    case = make_distillation(60, teacher="wider", ways=ways, words=400, features=32, dtype=dtype, frozen=False)
    ours = gradients(case.student, case.call(reduction="sum").loss)
    plain = [gradients(x.student, x.definition().loss.sum()) for x in (case.to(dtype), case.to(F64))]
    assert len(rooms) == (product_dtype(dtype, torch.device("cpu")) != F16)
    for name, gradient in ours.items():
        assert_within_budget(gradient, plain[0][name], plain[1][name], name)


@pytest.mark.parametrize("dtype", (BF16, pytest.param(F16, marks=pytest.mark.full), F32))
@pytest.mark.parametrize("size", (pytest.param(1.0, marks=pytest.mark.full), 30.0))
def test_many_blocks_of_tokens(size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 sums for each chunk of dW, twenty chunks; with 30 most labels are all but certain."""
    monkeypatch.setattr(blocks, "_ON_CPU", (64, 32))
    case = make_case(1500, words=640, dtype=dtype, frozen=False, bias=True, rank=3, size=size, ignored=0.1)
    with torch.no_grad():
        best = case.logits().argmax(-1)
    case.labels = torch.where((torch.rand(1500) < 0.9) & (case.labels >= 0), best, case.labels)
    ours = gradients(case, case.call(reduction="sum").loss)
    plain = [gradients(other, other.definition().loss.sum()) for other in (case.to(dtype), case.to(F64))]
    for name, gradient in ours.items():
        assert_within_budget(gradient, plain[0][name], plain[1][name], name)


@pytest.mark.parametrize("trained", (False, True))
def test_small_gradients_in_fp16_under_a_loss_scale(trained: bool) -> None:
    """Of confident tokens and small weights, which fp16 has no numbers for before they are scaled."""
    weight, labels = (torch.randn(500, 64) * 0.005).half(), torch.randint(0, 500, (16,))
    rows, errors = weight.float()[labels], []
    hidden = (rows * 22 / rows.square().sum(1, keepdim=True)).half()
    given = [hidden.double().requires_grad_(), weight.double().requires_grad_(trained)]
    wanted = [x for x in given if x.requires_grad]
    exact = torch.autograd.grad(F.cross_entropy(given[0] @ given[1].t(), labels) * 2**16, wanted)
    for ours in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        head = Head(w if trained else DenseWeight(w))
        loss = linear_cross_entropy(x, head, labels).loss if ours else F.cross_entropy((x @ w.t()).float(), labels)
        found = torch.autograd.grad(loss * 2**16, [each for each in (x, w) if each.requires_grad])
        assert all(each.dtype == F16 for each in found)
        errors.append([(each.double() - right).abs().max() for each, right in zip(found, exact, strict=True)])
    for error, theirs, right in zip(*errors, exact, strict=True):
        assert error <= 2 * theirs + torch.finfo(F16).eps * right.abs().max()


def test_gradients_in_fp16_of_a_distilled_head_are_not_kept(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_call, "product_dtype", lambda dtype, _: dtype)  # as on a GPU
    make_distillation(30, words=60, dtype=F16, frozen=False).call().loss.backward()
    assert not rooms


@pytest.mark.parametrize("dtype", (BF16, F16))
@pytest.mark.parametrize("trained", (False, True))
def test_nearly_all_smoothed(dtype: torch.dtype, trained: bool) -> None:
    """The label's row nearly vanishes from the hidden states' gradient."""
    hold(make_case(64, words=300, dtype=dtype, frozen=not trained, label_smoothing=0.9))
