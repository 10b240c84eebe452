"""Small MLPs on a GPU as three nodes: their projections by C++, and PyTorch's own activation between them.

The op's Python takes the host longer than the GPU needs for all of its products there, so the GPU waits; and what the
op does not keep for backward, the activation's result and factor, is little. Measured on an H200, 4 layers of Llama of
1024 features, 256 tokens: a step took 35.7 ms with the op's MLPs and 30.6 with PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..activation.reference import gated_activation_reference
from ..common.random import dropped
from ..lora import direct
from ..lora.autograd import apply as apply_group
from ..lora.projection import Dtypes
from .structure import Mlp

FEW_OPERATIONS = 2**35
"""Of one product, 0.05 ms of an H200 and 0.3 of a GPU of 100 TFLOP/s; the host takes about 1 ms for an MLP."""


def serves(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> bool:
    """Whether `apply` is faster; the same before and after the C++ is compiled, for what is kept differs."""
    tokens = x.numel() // max(x.shape[-1], 1)
    if x.device.type != "cuda" or 2 * tokens * x.shape[-1] * mlp.features >= FEW_OPERATIONS:
        return False
    inner, down = mlp.groups(dtypes, seeds)
    return all(
        direct.fits(like, group) == direct.ALL
        for like, group in ((x, inner), (x.new_empty(()).expand(tokens, mlp.features), down))
    )


def apply(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> Tensor:
    """As `autograd.apply`; keeps what the activation reads and gives."""
    inner, down = mlp.groups(dtypes, seeds)
    outputs = apply_group(x, inner)
    halves = outputs if len(outputs) == 2 or mlp.width == mlp.features else outputs[0].chunk(2, dim=-1)
    gate, up = (None, *halves)[-2:]
    assert up is not None
    h = gated_activation_reference(gate, up, mlp.activation)
    if drawn := mlp.drawn(seeds):
        h = dropped(h, *drawn)
    return apply_group(h, down)[0]
