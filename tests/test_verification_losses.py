"""What `verify` allows a loss from hidden states, on records that are made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.verification_losses import check_losses


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.01, False)])
def test_a_loss_of_16_bits_may_be_rounded_to_them_and_no_more(factor: float, passes: bool) -> None:
    """As T5 in float16 computes it; the factor stands for a wrong loss."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(32, 64).half(), (torch.randn(500, 64) / 8).half()
    labels = torch.randint(0, 500, (32,))

    def again(x: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), labels) * factor

    call = SimpleNamespace(
        hidden=hidden, values=lambda _: weight, s=None, b=None, out=torch.float16, bias=None, device=hidden.device
    )
    trail = SimpleNamespace(biases=(), scale=1.0, tanh=False, rows_of=lambda z: z, like=hidden)
    record: Any = SimpleNamespace(call=call, trail=trail, options={}, labels=labels, again=again)
    (loss, _), _ = check_losses([record])
    assert loss.error > 1e-5  # it is rounded
    assert (loss.error <= loss.budget) == passes
