"""Cross-entropy of given logits, by PyTorch's operations: the definition's values and gradients, from less memory."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpeft_kernels.loss import Options, cross_entropy, statistics_op
from fastpeft_kernels.loss import rows as walking
from fastpeft_kernels.loss.reference import token_losses_reference
from fastpeft_kernels.loss.steps import Running, known, online_step
from fastpeft_kernels.loss.whole_rows import running_of
from tests.budget import assert_within_budget

pytestmark = [pytest.mark.usefixtures("nan_filled"), pytest.mark.usefixtures("nothing_compiled_before")]

given = importlib.import_module("fastpeft_kernels.loss.cross_entropy")  # its function has the module's name

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
WORDS = 29
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "class_weight": torch.rand(WORDS) + 0.5},
    "smoothed": {"label_smoothing": 0.3},
    "z": {"z_loss": 0.1},
}

every_option = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, however few the logits are."""
    monkeypatch.setattr(walking, "_PIECE", 2 * WORDS)
    monkeypatch.setattr(given, "FEW_ON_CPU", 0)


def draw(dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor]:
    logits, labels = (torch.randn(*lead, WORDS) * 3).to(dtype), torch.randint(0, WORDS, lead)
    labels.view(-1)[1] = -100
    return logits, labels


def reference(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """The mean."""
    class_weight = options.pop("class_weight", None)
    flat = labels.flatten()
    losses = token_losses_reference(logits.flatten(0, -2), flat, Options(**options), class_weight)
    counted = flat != -100
    weights = torch.ones(WORDS, dtype=losses.dtype) if class_weight is None else class_weight.to(losses.dtype)
    return losses.sum() / weights[flat.clamp(min=0)][counted].sum()


def derived(function: Any, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, labels, **options)
    return loss.detach(), torch.autograd.grad(loss * 2.0, leaf)[0]


@every_option
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_within_budget(dtype: torch.dtype, name: str) -> None:
    """Over several losses: of one alone PyTorch's error is chance."""
    drawn = [draw(dtype, 3, 5) for _ in range(16)]
    before = [logits.clone() for logits, _ in drawn]

    def each(function: Any, wide: bool = False) -> list[Tensor]:
        found = [derived(function, x.double() if wide else x, labels, OPTIONS[name]) for x, labels in drawn]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    ours = each(cross_entropy)
    assert all(map(torch.equal, (logits for logits, _ in drawn), before))
    for x, y, z, what in zip(ours, each(reference), each(reference, wide=True), ("loss", "gradient"), strict=True):
        assert_within_budget(x, y, z, what)


def test_gradient_in_fp64() -> None:
    logits, labels = draw(F64, 5)
    weights = torch.rand(5, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return cross_entropy(x, labels, reduction="none", token_weight=weights, **OPTIONS["everything"])

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_reductions_are_pytorchs() -> None:
    logits, labels = draw(F32, 2, 6)
    flat, plain = (logits.flatten(0, 1), labels.flatten()), F.cross_entropy
    for reduction in ("mean", "sum"):
        torch.testing.assert_close(
            cross_entropy(logits, labels, reduction=reduction), plain(*flat, reduction=reduction)
        )
    losses = cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, plain(*flat, reduction="none").view(2, 6))
    torch.testing.assert_close(cross_entropy(logits, labels, num_items=7), losses.sum() / 7)
    torch.testing.assert_close(cross_entropy(logits, labels, num_items=torch.tensor(7)), losses.sum() / 7)
    weight = OPTIONS["everything"]["class_weight"]
    torch.testing.assert_close(cross_entropy(logits, labels, class_weight=weight), plain(*flat, weight=weight))


FEW: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "each": {"reduction": "none", "label_smoothing": 0.2},
    "classes": {"class_weight": torch.rand(WORDS, dtype=F64) + 0.5, "label_smoothing": 0.1},
    "tokens": {"token_weight": torch.rand(3, 5), "class_weight": torch.rand(WORDS) + 0.5},
    "tokens, each": {"token_weight": torch.rand(3, 5), "reduction": "none"},
    "items": {"num_items": torch.tensor(7), "ignore_index": 4},
}


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", (F32, BF16, F64))
def test_few_logits_are_pytorchs_operation(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every option that it has, and those that follow from its losses; the values are those of ours."""
    logits, labels = draw(dtype, 3, 5)
    labels[labels == -100] = FEW[name].get("ignore_index", -100)

    def both(leaf: Tensor) -> tuple[Tensor, Tensor]:
        loss = cross_entropy(leaf, labels, **FEW[name])
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    ours = both(logits.clone().requires_grad_())
    monkeypatch.setattr(given, "FEW_ON_CPU", logits.numel())
    monkeypatch.setattr(statistics_op, "apply", None)
    torch.testing.assert_close(both(logits.clone().requires_grad_()), ours)
    with pytest.raises(ValueError, match=f"labels: expected .* 0 <= label < {WORDS}, got {WORDS}"):
        cross_entropy(logits, labels.fill_(WORDS))


def test_nothing_counted() -> None:
    logits, labels = draw(F32, 4)[0].requires_grad_(), torch.full((4,), -100)
    loss = cross_entropy(logits, labels)
    assert loss.isnan()
    assert not torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)[0].any()
    assert cross_entropy(torch.empty(0, WORDS), torch.empty(0, dtype=torch.int64), reduction="sum") == 0.0


def test_extremes() -> None:
    """Masked words; an ignored row of NaN; logits far from zero; a label that is all but certain keeps its digits."""
    logits = torch.randn(5, WORDS)
    logits[0, ::2] = -torch.inf
    logits[1] = torch.nan
    logits[2] += 1e4
    logits[3] = -30.0
    logits[3, 4] = 30.0
    labels = torch.tensor([1, -100, 3, 4, 5])
    losses, gradient = derived(lambda x, y: cross_entropy(x, y, reduction="none").sum(), logits, labels, {})
    sound = labels != -100
    exact = logits.double()[sound].requires_grad_()
    wanted = F.cross_entropy(exact, labels[sound], reduction="none")
    torch.testing.assert_close(losses.double(), wanted.sum().detach())
    wanted_gradient = 2.0 * torch.autograd.grad(wanted.sum(), exact)[0]
    torch.testing.assert_close(gradient[sound].double(), wanted_gradient, rtol=1e-5, atol=1e-8)
    assert not gradient[1].any()
    certain = cross_entropy(logits[3:4], labels[3:4])
    others = torch.cat([logits[3, :4], logits[3, 5:]]).double() - 30.0
    torch.testing.assert_close(certain.double(), others.exp().sum().log1p(), rtol=1e-5, atol=0.0)


def test_whole_rows_say_what_one_step_says() -> None:
    """Of logits that are no numbers, too: all words masked, one infinite, the label masked; and beyond exp's range."""
    logits = torch.randn(6, WORDS)
    logits[0] = -torch.inf
    logits[1, 3] = torch.inf
    logits[2, ::2] = -torch.inf
    logits[4] = 3e38
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    whole = running_of(logits, labels, None, total=True)
    step = Running.start(6, F32, logits.device, total=True)
    online_step(logits.clone(), 0, labels, step)
    ours, wanted = asdict(known(whole)), asdict(known(step))
    assert ours["lse"][0] == -torch.inf
    torch.testing.assert_close({**ours, "total": whole.total}, {**wanted, "total": step.total}, equal_nan=True)


def test_strides() -> None:
    """Rows far apart, and columns."""
    wide, labels = draw(F32, 6)
    apart = torch.randn(6, 2 * WORDS)[:, :WORDS].copy_(wide)
    across = wide.t().contiguous().t()
    for logits in (apart, across):
        for x, y in zip(
            derived(cross_entropy, logits, labels, {}), derived(cross_entropy, wide, labels, {}), strict=True
        ):
            assert torch.equal(x, y)


def test_one_graph() -> None:
    logits, labels = draw(F32, 2, 3)
    options = OPTIONS["everything"]
    compiled = torch.compile(lambda x, y: cross_entropy(x, y, **options), fullgraph=True, backend="aot_eager")
    eager = derived(cross_entropy, logits, labels, options)
    torch.testing.assert_close(derived(compiled, logits, labels, {}), eager)


def test_one_derivative() -> None:
    logits, labels = draw(F32, 4)
    (gradient,) = torch.autograd.grad(cross_entropy(logits.requires_grad_(), labels), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(3, WORDS, dtype=torch.int64)}, TypeError, "logits: expected a floating tensor"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"logits: expected shape \(..., words\) with words >= 1"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels: expected shape \(3,\), got \(4,\)"),
        ({"labels": torch.full((3,), WORDS)}, ValueError, f"labels: expected .* 0 <= label < {WORDS}, got {WORDS}"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"backend": "triton", "logits": torch.zeros(3, WORDS, dtype=F64)}, ValueError, "logits: expected fp32, fp16"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    if changes.get("backend") == "triton":
        pytest.importorskip("triton")
    with pytest.raises(error, match=message):
        cross_entropy(**{"logits": torch.zeros(3, WORDS), "labels": torch.zeros(3, dtype=torch.int64), **changes})


class Sizes(TorchDispatchMode):
    """Counts the tensors of so many elements or more that operations make."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.storages: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.elements * x.element_size():
                self.storages[x.untyped_storage().data_ptr()] = x  # kept, so that no other takes its place
        return result


@pytest.mark.parametrize("dtype", (F32, BF16))
def test_nothing_as_large_as_the_logits_but_their_gradient(dtype: torch.dtype) -> None:
    logits, labels = draw(dtype, 40)
    logits.requires_grad_()
    with Sizes(logits.numel() // 2) as sizes:
        loss = cross_entropy(logits, labels, **OPTIONS["everything"])
        assert not sizes.storages.keys() - {logits.untyped_storage().data_ptr()}
        (gradient,) = torch.autograd.grad(loss, logits)
    made = sizes.storages.keys() - {logits.untyped_storage().data_ptr()}
    assert made == {gradient.untyped_storage().data_ptr()}
