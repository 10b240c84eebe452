"""The two memory figures, on computations whose memory is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastpeft.quickstart import memory
from fastpeft.quickstart.memory import MIB, PeakMemory, bytes_kept_for_backward

CPU = torch.device("cpu")


def test_what_a_linear_layer_keeps_is_its_input() -> None:
    model = nn.Linear(16, 8)
    source = torch.randn(4, 8)

    def forward() -> Tensor:
        x = torch.cat([source, source], dim=1)  # 4 x 16 floats, kept
        return model(x).sum()

    # The loss itself is alive too.
    assert bytes_kept_for_backward(model, forward) == 4 * 16 * 4 + 4


def test_parameters_and_what_is_freed_are_not_counted() -> None:
    model = nn.Linear(16, 8).requires_grad_(False)

    def forward() -> Tensor:
        return (model(torch.ones(4, 16)) + 1).sum()

    assert bytes_kept_for_backward(model, forward) == 4


def test_views_are_counted_once() -> None:
    model = nn.Linear(8, 8)
    source = torch.randn(4, 8)

    def forward() -> Tensor:
        x = source * 2
        return (model(x) + model(x.view(2, 2, 8).view(4, 8))).sum()

    assert bytes_kept_for_backward(model, forward) == 4 * 8 * 4 + 4


@pytest.mark.parametrize("kernel_helps", [True, False])
def test_a_peak_that_is_over_is_still_seen(kernel_helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel_helps:
        monkeypatch.setattr(memory, "_reset_highest", lambda: False)
    with PeakMemory(CPU) as peak:
        big = torch.ones(64 * MIB // 4)
        for _ in range(20):
            big.add_(1)
        del big
    assert 60 < peak.mib < 160


def test_an_earlier_peak_is_not() -> None:
    big = torch.ones(256 * MIB // 4)
    del big
    with PeakMemory(CPU) as peak:
        small = torch.ones(8 * MIB // 4)
    del small
    assert peak.mib < 100
