"""The MLP in plain PyTorch, differentiable by autograd: the oracle, and what the op computes by definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..activation.reference import gated_activation_reference
from ..common.random import dropped
from ..lora.projection import Dtypes
from ..lora.reference import lora_group_reference
from .structure import Mlp


def lora_mlp_reference(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> Tensor:
    """down(drop(activation(gate(x)) * up(x))), each projection as `lora_group_reference` has it.

    Args:
        x: (..., in_features).
        mlp: what to compute.
        dtypes: of every projection's frozen product, of its adapters' products, and of its result.
        seeds: dropout seeds of `mlp.projections`, or None; one more where `mlp.dropout` is not 0.

    Returns:
        (..., out_features) of dtype `dtypes.out`.
    """
    count = len(mlp.inner)
    inner = lora_group_reference(x, mlp.inner, dtypes, seeds[:count], mlp.adapter_index)
    if len(inner) == 2:
        gate, up = inner
    elif mlp.width == mlp.features:
        gate, up = None, inner[0]
    else:
        gate, up = inner[0].chunk(2, dim=-1)
    h = gated_activation_reference(gate, up, mlp.activation)
    if drawn := mlp.drawn(seeds):
        h = dropped(h, *drawn)
    return lora_group_reference(h, [mlp.down], dtypes, seeds[count : count + 1], mlp.adapter_index)[0]
