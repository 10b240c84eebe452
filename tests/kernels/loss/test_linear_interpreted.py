"""The fused loss with the Triton steps between its products, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.loss import blocks, forward, recompute

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
