"""Which GPUs read through tensor descriptors."""

from __future__ import annotations

import pytest
import torch

descriptors = pytest.importorskip("fastpeft_kernels.attention.descriptors")
from fastpeft_kernels.attention.tiles import Tile, tiles_for  # noqa: E402 (the reason to skip comes first)


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 103, 120, 121])
def test_where_a_product_is_made_of_what_they_bring(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From sm_120 on it is made from registers again, which then do not suffice."""
    monkeypatch.setattr(descriptors, "device_capability", lambda device: capability)
    rows = torch.zeros((1, 1, 16, 64), dtype=torch.float16)
    described = descriptors.sources(Tile(16, 16, 4, 1, tma=True), rows, rows, rows)["TMA"]
    assert described is (90 <= capability < 120)
    assert described or not any([tiles.forward.tma for tiles in tiles_for(capability, torch.float16, 64, 64)])
