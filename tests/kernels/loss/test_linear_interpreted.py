"""The fused loss with the Triton steps between its products, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.loss import blocks, forward, recompute
from tests.budget import assert_within_budget

from .heads import hold, make_case

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]

HEADS: dict[str, dict[str, Any]] = {
    "frozen": {"bias": True, "rank": 2, "softcap": 3.0, "z_loss": 1e-2},
    "trained": {"frozen": False, "rank": 2, "bias": True, "scale": 1.5, "class_weight": True, "label_smoothing": 0.1},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft_kernels.loss import triton_steps

    for module in (forward, recompute):
        monkeypatch.setattr(module, "steps_of", lambda dtype, device: triton_steps)
    monkeypatch.setattr(blocks, "_ON_CPU", (4, 16))
    hold(make_case(6, words=24, size=3.0, ignored=0.2, **HEADS[head]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_summed_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the logits of some tokens are kept."""
    from fastpeft_kernels.loss import triton_steps

    for module in (forward, recompute):
        monkeypatch.setattr(module, "steps_of", lambda dtype, device: triton_steps)
    monkeypatch.setattr(blocks, "_ON_CPU", (4, 16))
    case = make_case(7, features=5, words=24, size=3.0, ignored=0.0, frozen=False, bias=True, softcap=3.0, rank=2)
    names = [name for name, x in case.tensors.items() if x.requires_grad]
    losses = case.call(reduction="sum").loss, case.definition().loss.sum()
    ours, theirs = (torch.autograd.grad(loss, [case.tensors[name] for name in names]) for loss in losses)
    exact_case = case.to(torch.float64)
    exact = torch.autograd.grad(exact_case.definition().loss.sum(), [exact_case.tensors[name] for name in names])
    for name, *numbers in zip(names, ours, theirs, exact, strict=True):
        assert_within_budget(*numbers, name)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_same_numbers_with_gradients_and_without(entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft_kernels.loss import triton_steps

    monkeypatch.setattr(forward, "steps_of", lambda dtype, device: triton_steps)
    monkeypatch.setattr(blocks, "_ON_CPU", (16, 512))
    case = make_case(16, words=1500, size=3.0, ignored=0.0)
    loud = case.call(reduction="none", entropy=entropy)
    with torch.no_grad():
        quiet = case.call(reduction="none", entropy=entropy)
    assert torch.equal(loud.loss, quiet.loss)
    assert not entropy or (loud.entropy is not None and quiet.entropy is not None)
    assert not entropy or torch.equal(loud.entropy, quiet.entropy)  # type: ignore[arg-type]
