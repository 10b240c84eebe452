"""Models in a bad state: what plain PEFT gives or raises is what ours gives or raises, and the report says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from tests.integration.models import batch, make
from tests.integration.quantised import make_quantised
from tests.integration.reports import adapter_rows


def layer_of(model: nn.Module) -> Any:
    """One that is no part of an MLP, and comes first."""
    return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")


def rank_0(layer: Any) -> None:
    layer.lora_A["default"].weight = nn.Parameter(torch.empty(0, layer.in_features))
    layer.lora_B["default"].weight = nn.Parameter(torch.empty(layer.out_features, 0))


def base_on_meta(layer: Any) -> None:
    layer.base_layer.to("meta")


def adapter_on_meta(layer: Any) -> None:
    layer.lora_A.to("meta")


def base_in_another_dtype(layer: Any) -> None:
    layer.base_layer.to(torch.float16)


def adapters_of_two_dtypes(layer: Any) -> None:
    layer.lora_B["default"].to(torch.float16)


def b_of_another_rank(layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(layer.out_features, 3))


def b_of_another_size(layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(5, layer.r["default"]))


def a_not_finite(layer: Any) -> None:
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")


def without_quant_state(layer: Any) -> None:
    layer.base_layer.weight.quant_state = None
    layer.base_layer.quant_state = None


def another_blocksize(layer: Any) -> None:
    layer.base_layer.weight.quant_state.blocksize = 100


DENSE = (
    *(rank_0, base_on_meta, adapter_on_meta, base_in_another_dtype, adapters_of_two_dtypes),
    *(b_of_another_rank, b_of_another_size, a_not_finite),
)


ON_META = (base_on_meta, adapter_on_meta)
"""Of these torch makes arbitrary numbers by itself, so that there is nothing to compare."""


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | type[BaseException]:
    """The logits, or what was raised."""
    try:
        logits: Tensor = model(**inputs).logits
        return logits.detach()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    ("spoil", "build"),
    [*((spoil, make) for spoil in DENSE), *((s, make_quantised) for s in (without_quant_state, another_blocksize))],
    ids=lambda value: value.__name__,
)
def test_as_in_peft(spoil: Callable[[Any], None], build: Callable[[], Any]) -> None:
    peft = build()
    inputs = batch(peft)
    ours = fastpeft.accelerate(copy.deepcopy(peft))
    for model in (peft, ours):
        spoil(layer_of(model))
    expected = None if spoil in ON_META else outcome(peft, inputs)
    for _ in range(2):  # the first call looks for siblings
        found = outcome(ours, inputs)
        if expected is None:
            continue
        if isinstance(expected, Tensor):
            assert isinstance(found, Tensor), found
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert not isinstance(found, Tensor), f"a number where PEFT raises {expected.__name__}"
    row = next(row for row in adapter_rows(ours) if row.path.endswith("layers.0.self_attn.q_proj"))
    assert row.note or spoil in (a_not_finite, rank_0)
