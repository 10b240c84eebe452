"""Where the adapters' products are made in the activation's own pass: conditions, and what goes in and comes out.

On an H200, 8192 tokens of 14336 features, ranks 16, bf16: forward 191 us in place of 230, backward 420 in place of 606.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora import keys
from ..lora.projection import Dtypes, Group, LoraProjection, Packed
from ..tuning.choosing import choice, gathers
from ..tuning.keys import CHECKED_TOKENS, bucket, dtype_name
from .structure import Mlp

FUSED = "lora_mlp_activation"
MAX_RANK = 16
"""Ranks of one projection: one block of the smallest product that tensor cores have."""
_FEATURES = 16
"""The kernels' loads take several features at a time where their number is a multiple of it."""

Flags = Sequence[Sequence[bool]]


class FusedKey(NamedTuple):
    """The activation of an MLP whose projections have an adapter each, of `MAX_RANK` or less; all of one dtype.

    Tokens are rounded up to a power of two.
    """

    tokens: int
    features: int
    activation: str
    gated: bool
    dtype: str

    def __str__(self) -> str:
        return f"{self.tokens}x{self.features}, {self.activation}{' gated' * self.gated}, {self.dtype}"

    def at(self, tokens: int, device: torch.device) -> FusedKey:
        return self._replace(tokens=bucket(tokens))

    def smaller(self) -> FusedKey:
        return self._replace(tokens=min(self.tokens, CHECKED_TOKENS))


def candidates(device: torch.device) -> tuple[str, ...]:
    """Candidates for the activation's pass and the adapters' products that read what it reads."""
    return ("apart", "fused") if keys.kernels_serve(device) else ("apart",)


def activation_with_down(pre: Tensor, mlp: Mlp, group: Group, packed: Packed, h: Tensor) -> Tensor | None:
    """Fills h and returns S of the down projection, from one pass over gate and up; None where nothing was done.

    Args:
        pre: gate and up, (tokens, width).
        group, packed: the down projection, and its adapters.
        h: (tokens, features).
    """
    a = packed.a
    if a is None or not _one_block(mlp.down) or group.drops or not _chosen(pre, mlp, group.dtypes):
        return None
    from .fused_forward import gated_activation_with_down

    return gated_activation_with_down(*mlp.halves(pre), mlp.activation, h, a)


class Gradients(NamedTuple):
    """Of `activation_backward`: dS of the inner projections side by side, and gradients of `tensors()` of each."""

    ds: Tensor
    inner: list[list[Tensor | None]]
    da_down: Tensor | None


def activation_backward(
    dh: Tensor,
    pre: Tensor,
    dpre: Tensor,
    s: Tensor | None,
    ds_down: Tensor | None,
    mlp: Mlp,
    group: Group,
    packed: Packed,
    needs: Flags,
    down_drops: bool,
) -> Gradients | None:
    """Fills dpre and makes the adapters' products with it and with h, from one pass; None where nothing was done.

    Args:
        dh: gradient of h, (tokens, features).
        pre, dpre: gate and up, and room for their gradients, which may be the same.
        s: as kept by forward.
        ds_down: dS of the down projection where its `a` is trained, else None.
        group, packed: the inner projections, and their adapters.
        needs: which of `tensors()` of each of `mlp.projections` are trained.
        down_drops: whether what the down projection reads loses elements.
    """
    if s is None or dh.dtype != pre.dtype or not _inner_fits(mlp, needs) or not _chosen(pre, mlp, group.dtypes):
        return None
    if ds_down is not None and (down_drops or not _one_block(mlp.down)):
        return None
    from ..lora.partial_sums import lora_sum
    from .fused_backward import UpAdapter, gated_activation_backward_with_adapters

    adapters: list[UpAdapter | None] = []
    column = 0
    for projection, b in zip(mlp.inner, packed.b, strict=True):
        adapters.append(None if b is None else UpAdapter(b, s[:, column : column + projection.rank]))
        column += projection.rank
    gate_adapter = adapters[0] if len(adapters) == 2 else None
    dgate, dup = mlp.halves(dpre)
    found = gated_activation_backward_with_adapters(
        dh, *mlp.halves(pre), mlp.activation, dgate=dgate, dup=dup, gate_adapter=gate_adapter, up_adapter=adapters[-1],
        ds_down=ds_down,
    )  # fmt: skip
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs[:-1]]
    partial = [found.db_gate, found.db_up][-len(adapters) :]
    for projection, db, of_it in zip(mlp.inner, partial, grads, strict=True):
        if db is not None:
            adapter = projection.adapters[0]
            of_it[2] = lora_sum(db, torch.empty_like(adapter.b), adapter.scaling)
    a = None if found.da_down is None else mlp.down.adapters[0].a
    da_down = None if a is None or found.da_down is None else lora_sum(found.da_down, torch.empty_like(a))
    return Gradients(found.ds, grads, da_down)


def _inner_fits(mlp: Mlp, needs: Flags) -> bool:
    """Whether gate and up, or up alone, are projections of their own, with one trained adapter each, or none."""
    if mlp.one_a or any(projection.weight.shape[0] != mlp.features for projection in mlp.inner):
        return False
    adapted = [i for i, projection in enumerate(mlp.inner) if projection.adapters]
    trained = all(needs[i][2] for i in adapted) and not any(any(flags[0::3]) for flags in needs[:-1])
    return bool(adapted) and trained and all(_one_block(mlp.inner[i]) for i in adapted)


def _one_block(projection: LoraProjection) -> bool:
    return len(projection.adapters) == 1 and 1 <= projection.rank <= MAX_RANK


def _chosen(pre: Tensor, mlp: Mlp, dtypes: Dtypes) -> bool:
    """Whether the kernels serve these dtypes and sizes on this device, and are to be taken."""
    device, dtype = pre.device, pre.dtype
    if mlp.adapter_index is not None or mlp.dropout:
        return False
    if dtype.itemsize != 2 or pre.numel() == 0 or mlp.features % _FEATURES or not keys.kernels_serve(device):
        return False
    if not dtypes.compute == dtypes.lora == dtypes.out == dtype:
        return False

    def case() -> FusedKey:
        gated = mlp.width > mlp.features
        return FusedKey(bucket(pre.shape[0]), mlp.features, mlp.activation, gated, dtype_name(dtype))

    chosen = choice(FUSED, device, case, candidates, keys.default_fused(pre))
    return chosen == "fused" and not gathers()  # apart, the products ask for themselves, and are met
