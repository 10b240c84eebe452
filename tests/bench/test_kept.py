"""What a forward keeps for backward, on computations where it is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.bench.kept import bytes_kept, bytes_saved


def test_what_a_linear_layer_keeps_is_its_input() -> None:
    model = nn.Linear(16, 8)
    source = torch.randn(4, 8)

    def forward() -> Tensor:
        x = torch.cat([source, source], dim=1)  # 4 x 16 floats, kept
        return model(x).sum()

    # The loss itself is alive too.
    assert bytes_kept(model, forward) == 4 * 16 * 4 + 4


def test_parameters_and_what_is_freed_are_not_counted() -> None:
    model = nn.Linear(16, 8).requires_grad_(False)

    def forward() -> Tensor:
        return (model(torch.ones(4, 16)) + 1).sum()

    assert bytes_kept(model, forward) == 4


def test_views_are_counted_once() -> None:
    model = nn.Linear(8, 8)
    source = torch.randn(4, 8)

    def forward() -> Tensor:
        x = source * 2
        return (model(x) + model(x.view(2, 2, 8).view(4, 8))).sum()

    assert bytes_kept(model, forward) == 4 * 8 * 4 + 4


def test_a_compiled_layer_saves_its_input_too() -> None:
    model = nn.Linear(16, 8)
    compiled = torch.compile(model, backend="aot_eager")
    source = torch.randn(4, 8)
    assert (
        bytes_saved(model, lambda: compiled(torch.cat([source, source], dim=1)).square().sum())
        == 4 * 16 * 4 + 4 * 8 * 4
    )
    torch._dynamo.reset()
