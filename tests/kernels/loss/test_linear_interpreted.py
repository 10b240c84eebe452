"""The fused loss with the Triton steps between its products, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest

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
