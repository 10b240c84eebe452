"""An MLP with LoRA as one differentiable operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import autocast_off
from ..common.random import draw_seed
from ..common.tracing import as_op
from ..lora.api import draw_seeds, given_seeds, resolve_dtypes
from ..lora.projection import Dtypes
from . import apart, autograd, custom_op, tiled_op
from .structure import Mlp, check_mlp

KEEP = ("preactivations", "input")


def lora_mlp(
    x: Tensor,
    mlp: Mlp,
    *,
    keep: str = "preactivations",
    tile: int = 0,
    compute_dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    training: bool = True,
    seeds: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """down(drop(activation(gate(x)) * up(x))), each projection frozen with any number of adapters.

    Equivalent PyTorch: `mlp.reference.lora_mlp_reference`. Gradients reach x, every adapter's a, b and bias, and the
    projections' biases, where they require them; the frozen weights never get one. Keeps x, gate(x), up(x) and
    rank-sized matrices for backward: not the activation, not its product with up(x), no mask, no decoded weight.

    Args:
        x: (..., in_features), floating; any number of leading dimensions, also empty.
        mlp: its projections, (features, in_features) and (out_features, features), and the activation; in a mixed batch
            also whose adapter each row of x (rows, ..., in_features) has, as `adapter_index` of `lora_linear_group`.
        keep: "preactivations" keeps gate(x) and up(x); "input" keeps x alone and computes those again in backward,
            without the down projection.
        tile: tokens that are computed at a time, forward and backward, with `keep="input"`; 0 for all at once. Then
            nothing of gate(x), up(x) or what is made of them is larger than a tile. Gradients of parameters are summed
            over the tiles, in fp32 at the least.
        compute_dtype, lora_dtype, out_dtype: as `lora.lora_linear_group`, for every projection.
        training: False switches dropout off, that of the adapters' inputs and `mlp.dropout`.
        seeds: dropout seeds, int64 (1,) or None for each of `mlp.projections`, and one more for `mlp.dropout` where it
            is not 0; default drawn in their order.

    Returns:
        A new tensor (..., out_features).

    Raises:
        TypeError: an argument that is no tensor, not floating, or adapters of differing dtypes.
        ValueError: sizes or devices that do not fit, an unknown activation or `keep`.
        RuntimeError: in backward, when a frozen weight was changed or moved since forward.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; gated MLPs, Shazeer 2020, arXiv:2002.05202.
    """
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}, got {keep!r}")
    if type(tile) is not int or tile < 0:
        raise ValueError(f"tile: expected 0 or more tokens, got {tile!r}")
    if tile and keep != "input":
        raise ValueError(f"tile: expected 0 with keep={keep!r}, which keeps gate and up of all tokens, got {tile}")
    check_mlp(x, mlp)
    if tile and (reason := why_not_tiled(mlp)) is not None:
        raise ValueError(f"tile: expected 0 for {reason}, got {tile}")
    dtypes = resolve_dtypes(x, mlp.projections, compute_dtype, lora_dtype, out_dtype)
    if seeds is None:
        drawn = draw_mlp_seeds(x.device, mlp, training)
    else:
        drawn = given_seeds(seeds, x, mlp.projections, training, more=[mlp.dropout] if mlp.dropout else [])
    return run_mlp(x, mlp, dtypes, drawn, keep == "preactivations", tile)


def run_mlp(
    x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], keep: bool = True, tile: int = 0
) -> Tensor:
    """`lora_mlp` for callers that have checked their arguments.

    torch.compile, selective checkpointing and fake tensors see two ops forward and one backward; in tiles one each way.
    """
    with autocast_off(x.device):
        if as_op():
            return tiled_op.apply(x, mlp, dtypes, seeds, tile) if tile else custom_op.apply(x, mlp, dtypes, seeds, keep)
        dtypes = dtypes.for_input(x)
        if keep and not tile and apart.serves(x, mlp, dtypes, seeds):
            return apart.apply(x, mlp, dtypes, seeds)
        return autograd.apply(x, mlp, dtypes, seeds, keep, tile)


def draw_mlp_seeds(device: torch.device, mlp: Mlp, training: bool) -> list[Tensor | None]:
    """Seeds as `lora_mlp` takes them."""
    seeds = draw_seeds(device, mlp.projections, training)
    return [*seeds, draw_seed(device) if training else None] if mlp.dropout else seeds


def why_not_tiled(mlp: Mlp) -> str | None:
    """Why tiles would give other numbers, or None."""
    if mlp.adapter_index is not None:
        return "rows with adapters of their own"
    if all([projection.weight.row_by_row for projection in mlp.projections]):
        return None
    return "weights whose product looks at all tokens at once"
