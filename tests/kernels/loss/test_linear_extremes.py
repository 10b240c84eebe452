"""Confident labels, extreme and masked logits, NaN, nothing counted, and other edges of the fused loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.loss import Head, blocks, linear_cross_entropy
from fastpeft_kernels.weights import DenseWeight
from tests.budget import assert_within_budget

from .heads import hold, make_case

both = pytest.mark.parametrize("trained", (False, True))
wide_and_narrow = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_CPU", (4, 7))


def head_of(weight: Tensor, trained: bool, bias: Tensor | None = None) -> Head:
    return Head(weight.requires_grad_() if trained else DenseWeight(weight), bias)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


@both
def test_confident_labels_keep_their_digits(trained: bool) -> None:
    """The label's logit is 30 above all others: p - 1 in fp32 would be 0 or -6e-8 in place of -2e-12."""
    hidden = torch.eye(6, 8) + 0.01 * torch.randn(6, 8)
    weight, labels = torch.randn(20, 8) * 0.1, torch.arange(6)
    weight[:6] += 30 * torch.eye(6, 8)
    hidden.requires_grad_()
    out = linear_cross_entropy(hidden, head_of(weight, trained), labels, reduction="none")
    exact = hidden.detach().double().requires_grad_()
    z = exact @ weight.detach().double().t()
    others = torch.arange(20) != labels[:, None]  # in fp64 too p - 1 would have four digits left
    losses = ((z - z.gather(1, labels[:, None])).exp() * others).sum(1).log1p()
    assert losses.max() < 1e-9
    torch.testing.assert_close(out.loss.double(), losses, rtol=2e-5, atol=0)
    ours, want = torch.autograd.grad(out.loss.sum(), hidden)[0], torch.autograd.grad(losses.sum(), exact)[0]
    # a logit of 30 is known to 2e-6, and exp makes that a relative error
    assert (ours - want).norm() / want.norm() < 2e-5
    naive = torch.autograd.grad(plain(hidden, weight, labels), hidden)[0] * 6
    assert (naive - want).norm() / want.norm() > 0.1


@both
@pytest.mark.parametrize("size", (1e3, 1e4))
def test_extreme_logits(trained: bool, size: float) -> None:
    """Products without rounding, so that the softmax alone is at stake."""
    hidden = torch.randint(-3, 4, (9, 4)).float()
    weight = torch.randint(-3, 4, (30, 4)) * (size / 16)
    labels = (hidden @ weight.t()).topk(2).indices[:, 1]

    def run(dtype: torch.dtype, ours: bool) -> tuple[Tensor, Tensor]:
        x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype, copy=True)
        if ours:
            losses = linear_cross_entropy(x, head_of(w, trained), labels, reduction="none").loss
        else:
            losses = F.cross_entropy(F.linear(x, w), labels, reduction="none")
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]

    results = run(torch.float32, True), run(torch.float32, False), run(torch.float64, False)
    for ours, same, exact in zip(*results, strict=True):
        assert_within_budget(ours, same, exact)


@both
def test_masked_words(trained: bool) -> None:
    """A bias of -inf, over a whole chunk of words too; and one that has all words but one masked."""
    hidden, weight, labels = torch.randn(5, 8, requires_grad=True), torch.randn(23, 8), torch.tensor([20, 21, 22, 0, 0])
    for masked in (slice(1, 16), slice(1, 23)):
        bias = torch.zeros(23)
        bias[masked] = -torch.inf
        y = labels if masked.stop == 16 else torch.zeros_like(labels)
        out = linear_cross_entropy(hidden, head_of(weight.clone(), trained, bias), y, entropy=True)
        want = plain(hidden, weight, y, bias)
        torch.testing.assert_close(out.loss, want)
        ours, theirs = (torch.autograd.grad(loss, hidden)[0] for loss in (out.loss, want))
        torch.testing.assert_close(ours, theirs)
        assert out.entropy is not None and out.entropy.isfinite().all()


@both
def test_infinite_and_undefined_losses(trained: bool) -> None:
    hidden, weight, labels = torch.randn(4, 8), torch.randn(23, 8), torch.tensor([3, 9, 9, 3])
    bias = torch.zeros(23)
    bias[9] = -torch.inf
    losses = linear_cross_entropy(hidden, head_of(weight, trained, bias), labels, reduction="none").loss
    assert losses.isinf().tolist() == [False, True, True, False]
    none = torch.full((23,), -torch.inf)
    losses = linear_cross_entropy(hidden, head_of(weight.detach(), trained, none), labels, reduction="none").loss
    assert losses.isnan().all()


@both
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("word", (0, 5, 22))
def test_nan_stays_in_its_row(trained: bool, value: float, word: int) -> None:
    """Whether in the first chunk or the last, at the label or not."""
    hidden, weight = torch.randn(6, 8), torch.randn(23, 8)
    hidden[:, 0], weight[:, 0] = 0.0, 0.0
    hidden[2, 0], weight[word, 0] = value, 1.0
    labels = torch.full((6,), 5)
    hidden.requires_grad_()
    out = linear_cross_entropy(hidden, head_of(weight, trained), labels, reduction="none", correct=True)
    gradient = torch.autograd.grad(out.loss.sum(), hidden)[0]
    assert out.loss.isnan().tolist() == [row == 2 for row in range(6)]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [row == 2 for row in range(6)]
    assert out.correct is not None and not out.correct[2]


@both
@wide_and_narrow
def test_nothing_counted(trained: bool, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, 8, dtype=dtype, requires_grad=True), torch.randn(23, 8, dtype=dtype)
    labels = torch.full((5,), -100)
    head = head_of(weight, trained)
    wanted = [hidden, weight] if trained else [hidden]
    for loss, expected in (
        (linear_cross_entropy(hidden, head, labels).loss, torch.tensor(torch.nan)),
        (linear_cross_entropy(hidden, head, labels, reduction="sum").loss, torch.tensor(0.0)),
        (linear_cross_entropy(hidden, head, labels, num_items=3).loss, torch.tensor(0.0)),
    ):
        torch.testing.assert_close(loss, expected, equal_nan=True)
        for gradient in torch.autograd.grad(loss, wanted):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@both
@wide_and_narrow
@pytest.mark.parametrize("lead", ((0,), (2, 0)))
def test_no_tokens(trained: bool, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(*lead, 8, dtype=dtype, requires_grad=True), torch.randn(23, 8, dtype=dtype)
    out = linear_cross_entropy(
        hidden, head_of(weight, trained), torch.zeros(lead, dtype=torch.int64), reduction="none", log_probs=True
    )
    assert out.loss.shape == lead and out.log_probs is not None and out.log_probs.shape == lead
    gradients = torch.autograd.grad(out.loss.sum(), [hidden, weight] if trained else [hidden])
    assert gradients[0].shape == hidden.shape and all(not gradient.any() for gradient in gradients)


@both
def test_reductions(trained: bool) -> None:
    case = make_case(3, 4, dtype=torch.float64, frozen=not trained)
    logits = F.linear(case.tensors["hidden"], case.head().weight.decode() if not trained else case.tensors["weight"])
    flat, labels = logits.flatten(0, 1), case.labels.flatten()
    weight = torch.rand(24, dtype=torch.float64)
    for smoothing, classes in ((0.0, None), (0.2, weight)):
        for reduction in ("mean", "sum", "none"):
            ours = case.call(reduction=reduction, label_smoothing=smoothing, class_weight=classes).loss
            want = F.cross_entropy(flat, labels, classes, reduction=reduction, label_smoothing=smoothing)
            torch.testing.assert_close(ours, want.view(ours.shape))
        for items in (7, torch.tensor(7)):
            ours = case.call(num_items=items, class_weight=classes).loss
            torch.testing.assert_close(ours, F.cross_entropy(flat, labels, classes, reduction="sum") / 7)


@both
def test_strides(trained: bool) -> None:
    case = make_case(3, 4, features=8, words=23, frozen=not trained, bias=True, rank=2)
    tensors = {name: x.detach().t().contiguous().t() for name, x in case.tensors.items() if x.dim() == 2}
    wide = torch.randn(4, 3, 16)
    wide[:, :, ::2] = case.tensors["hidden"].detach().transpose(0, 1)
    tensors["hidden"] = wide.transpose(0, 1)[:, :, ::2]
    tensors["bias"] = case.tensors["bias"].detach()[:, None].expand(23, 3).contiguous()[:, 1]
    for name, x in tensors.items():
        assert not x.is_contiguous()
        case.tensors[name] = x.requires_grad_(case.tensors[name].requires_grad)
    hold(case)


def test_fp16_overflows_as_the_product_does() -> None:
    """In fp32 products on a CPU without 16-bit ones 1e5 is a logit like another; never is a finite loss wrong."""
    hidden, weight = torch.full((2, 4), 300.0, dtype=torch.float16), torch.randn(9, 4, dtype=torch.float16)
    weight[3] = 100.0
    losses = linear_cross_entropy(hidden, head_of(weight, False), torch.tensor([3, 4]), reduction="none").loss
    want = F.cross_entropy(hidden.double() @ weight.double().t(), torch.tensor([3, 4]), reduction="none")
    finite = losses.isfinite()
    torch.testing.assert_close(losses[finite].double(), want[finite], rtol=1e-6, atol=1e-6)


def test_other_dtypes_of_weight_and_update() -> None:
    """A bf16 weight under fp32 hidden states, and fp32 adapters on bf16 ones."""
    for dtype, weight_dtype, low_dtype in (
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ):
        for frozen in (True, False):
            case = make_case(9, words=23, frozen=frozen, rank=3, dtype=dtype)
            for name in ("s", "b"):
                trained = case.tensors[name].requires_grad
                case.tensors[name] = case.tensors[name].detach().to(low_dtype).requires_grad_(trained)
            if frozen:
                case.stored = DenseWeight(torch.randn(23, 16).to(weight_dtype))
            else:
                case.tensors["weight"] = torch.randn(23, 16).to(weight_dtype).requires_grad_()
            out = case.call(reduction="none")
            want = case.definition()
            given = torch.randn(9)
            ours, theirs = case.gradients(out, given, None), case.gradients(want, given, None)
            oracle = case.to(torch.float64)
            exact = oracle.gradients(oracle.definition(), given, None)
            for name, value in ours.items():
                assert value.dtype == case.tensors[name].dtype
                assert_within_budget(value, theirs[name], exact[name], name)


def test_hits_with_equal_logits() -> None:
    """As argmax: the first of them, also where the other is in another chunk."""
    weight = torch.randn(23, 4)
    weight[3] = weight[5] = weight[20] = 4.0
    hidden = torch.ones(3, 4)
    correct = linear_cross_entropy(hidden, head_of(weight, False), torch.tensor([3, 5, 20]), correct=True).correct
    assert correct is not None and correct.tolist() == [True, False, False]
