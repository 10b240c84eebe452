"""The MLP over tiles of tokens: the same numbers as the whole, and nothing in memory that is wider than a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft.memory.live import LiveBytes
from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.common.random import dropout_bits, seeds_from
from fastpeft_kernels.lora import Dtypes, LoraProjection
from fastpeft_kernels.lora.layout import flatten_group
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.mlp import Mlp, lora_mlp
from fastpeft_kernels.mlp.custom_op import lora_mlp_backward_op
from fastpeft_kernels.mlp.tiled import Tiles
from fastpeft_kernels.mlp.tiled_op import lora_mlp_tiled_op
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import DecodedOnce, DenseWeight, FourBitWeight, unflatten_weight
from tests.kernels.compiling import F32_ON_BF16, check_changing_sizes, check_one_graph, check_selective_checkpointing
from tests.kernels.lora.groups import parameters, seeds_for
from tests.kernels.lora.test_counts import products
from tests.kernels.mlp.mlps import LAYOUTS, check_mlp, mlp
from tests.kernels.mlp.test_properties import DTYPES, Drawn, check_in_fp64, check_within_budget, mlps

pytestmark = pytest.mark.usefixtures("nan_filled")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FULL = pytest.mark.full
TILES = st.one_of(st.integers(1, 5), st.integers(1, 80))


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the tests' shared checks compute by tiles."""

    def of(tile: int) -> None:
        def tiled(*args: Any, **named: Any) -> Tensor:
            return lora_mlp(*args, **{**named, "keep": "input", "tile": tile})

        monkeypatch.setattr("tests.kernels.mlp.mlps.lora_mlp", tiled)
        monkeypatch.setattr("tests.kernels.mlp.test_properties.lora_mlp", tiled)

    return of


@settings(max_examples=20)
@given(case=mlps(), tile=TILES)
def test_in_fp64(case: Drawn, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{mlps.__module__}.lora_mlp", tiled_by(tile))
        check_in_fp64(case)


@settings(max_examples=10)
@given(case=mlps(12), tile=TILES, dtypes=st.sampled_from(DTYPES))
def test_within_the_budget(case: Drawn, tile: int, dtypes: Dtypes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{mlps.__module__}.lora_mlp", tiled_by(tile))
        check_within_budget(case, dtypes)
