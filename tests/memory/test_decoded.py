"""Decoded weights that wait from a layer's recomputation for its backward."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft_kernels.weights import FourBitWeight
from tests.integration.models import batch, make_base, with_lora
from tests.integration.quantised import quantise
from tests.memory.test_policies import seeded

SQUARE = 64 * 64 * 4
"""Bytes of a decoded q_proj of the tiny model; k and v are half of it, an MLP's projections twice."""


@pytest.mark.parametrize(
    ("room", "decodes"), [pytest.param(0, 20, marks=pytest.mark.full), (SQUARE, 19), (1 << 30, 14)]
)
@pytest.mark.parametrize("how", ["recompute", pytest.param("offload", marks=pytest.mark.full)])
def test_decodes_of_a_layer(how: Any, room: int, decodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 forward, 7 in backward and, since down is not made again, 6 between; the same bits with as many less as fit."""
    made: list[FourBitWeight] = []
    decode = FourBitWeight.decode

    def noted(self: FourBitWeight, *args: Any, **given: Any) -> Tensor:
        made.append(self)
        return decode(self, *args, **given)

    found = []
    for depth in (2, 3):
        model = fastpeft.accelerate(with_lora(quantise(make_base(num_hidden_layers=depth)), lora_dropout=0.3))
        given = batch(model)
        fastpeft.accelerate(model, memory=MemoryPolicy(LayerPolicy(how), decoded=room))
        seeded(model, given)  # finds the siblings
        with monkeypatch.context() as patch:
            patch.setattr(FourBitWeight, "decode", noted)
            got = seeded(model, given)
        assert got.equals(seeded(fastpeft.accelerate(model), given))
        found.append(len(made))
        made.clear()
    assert found[1] - found[0] == decodes
