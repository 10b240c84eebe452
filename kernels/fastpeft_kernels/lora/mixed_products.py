"""The products of a mixed batch, each row's with the matrices of its own adapter.

By the library a batched product of groups of rows (`RowGroups`); by our kernels the launches of a batch with one
adapter, each program of which reads the adapter of its rows (`RowSlots`). With our kernels dS and dB come from one read
of dY, and the update is one pass over its output.

Unmeasured the library serves. A step of two Llama layers of 4096 features (8 rows of 1024 tokens, r = 16, autocast,
8 adapters) took 46.8 ms by it on an H200 whose host is slow, 55.7 by our kernels, and 32.1 with one adapter; over NF4
51.1, 55.3 and 39.0. The GPU was busy for 22.0 and 20.2 ms with several adapters and with one: the host decided, and a
launch of Triton costs it more. Not yet measured since C++ takes part (`mixed_native`, `direct`).

On paper, for 8 rows of 1024 tokens, K = N = 4096, r = 16, bf16, an adapter a row; no product is measured by itself yet.
Programs, or tiles of 128 x 64 of a batched product, for the 132 multiprocessors of an H200:

| product | one adapter | batched | ours |
|---|---|---|---|
| S = X A^T | 256, 67 MB | 64, 67 MB | 256, 67 MB |
| Y += S B^T | in the large product's accumulator | 4096, 67 MB, which that reads again | 4096, the same |
| dS and dB | 272, 92 MB | 64 and 256, 134 MB | 256, 92 MB |
| dX += dS A | as Y | as Y | as Y |
| dA = dS^T X | 288, 71 MB | 256, 69 MB | 256, 71 MB |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.device import hopper_dots_safe
from ..common.random import dropout
from ..tuning.choosing import choice
from . import keys, mixed_native
from .mixed_rows import RowGroups, RowSlots, row_groups, row_slots
from .projection import Group, Mask


@dataclass(frozen=True, slots=True)
class MixedProducts:
    """Of one group and so many tokens.

    Attributes:
        group: with `adapter_index`.
        tokens: of the whole batch.
    """

    group: Group
    tokens: int

    def ours(self, features: int, rank: int, dtype: torch.dtype) -> bool:
        """Whether our kernels compute products of a matrix (tokens, features) with matrices of rank width."""
        backend, device = self.group.backend, self.group.projections[0].weight.device
        if backend == "library" or 0 in (self.tokens, features, rank):
            return False
        if backend == "triton":
            return True
        if dtype.itemsize != 2 or not keys.kernels_serve(device):
            return False

        def case() -> keys.MixedKey:
            return keys.mixed_key(self.tokens, features, rank, dtype, len(self.group.adapter_index or ()))

        return choice(keys.MIXED, device, case, keys.rank_backends, "library") == "triton"

    def project_down(self, x: Tensor, a: Tensor, out: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """dropout(x) A^T, (tokens, rank), of x (tokens, features) and a (slots, rank, features)."""
        if self.ours(x.shape[1], a.shape[1], a.dtype):
            from .forward import lora_down

            x, options = self._masked(x, mask)
            return lora_down(x, a, out=out, rows=self.slots(), **options)
        return self.batched(_dropped(x, mask), a.mT, out)

    def update(
        self,
        s: Tensor,
        b: Tensor,
        out: Tensor,
        bias: Tensor | None = None,
        mask: Mask | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """out[:] = (out) + dropout(s b) + bias, of s (tokens, rank) and b (slots, rank, features)."""
        if self.ours(b.shape[2], b.shape[1], b.dtype) and (mask is None or self._drops_inside()):
            from .backward import lora_down_bwd_input_

            options = {} if mask is None else mask._asdict()
            return lora_down_bwd_input_(out, s, b, rows=self.slots(), bias=bias, accumulate=accumulate, **options)
        if mask is None and not accumulate and out.dtype == s.dtype:
            return self.batched(s, b, out, bias)
        part = _dropped(self.batched(s, b, None, bias), mask)
        return out.add_(part) if accumulate else out.copy_(part)

    def both_gradients(self, dy: Tensor, b: Tensor, s: Tensor, ds: Tensor, dtype: torch.dtype) -> Tensor:
        """Fills ds with dy B and returns dy^T s, (slots, features, rank), of dy (tokens, features), b (slots, features,
        rank); in fp32 at least where `dtype`, the parameter's, is so wide."""
        if self.ours(dy.shape[1], b.shape[2], b.dtype):
            from .backward import lora_down_bwd_weight, lora_up_bwd
            from .configs import UP

            if dy.dtype.itemsize == 2 and b.shape[2] <= UP[0].block_r:
                return lora_up_bwd(dy, b, s, ds, rows=self.slots())
            self.project_down(dy, b.mT, ds)
            return lora_down_bwd_weight(dy, s, rows=self.slots(), features_first=True)
        return self.groups().both_gradients(dy, b, s, ds, dtype)

    def down_gradient(self, ds: Tensor, x: Tensor, dtype: torch.dtype, mask: Mask | None = None) -> Tensor:
        """ds^T dropout(x), (slots, rank, features); `dtype` as for `both_gradients`."""
        if self.ours(x.shape[1], ds.shape[1], ds.dtype):
            from .backward import lora_down_bwd_weight

            x, options = self._masked(x, mask)
            return lora_down_bwd_weight(x, ds, rows=self.slots(), **options)
        return self.groups().outer(ds, _dropped(x, mask), dtype)

    def batched(self, t: Tensor, stack: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """t by its rows' matrices of `stack` (slots, k, n), plus bias, by the library."""
        return self.groups().multiply(t, stack, out, bias)

    def _masked(self, x: Tensor, mask: Mask | None) -> tuple[Tensor, dict[str, Any]]:
        """x and the options with which our kernels read dropout(x)."""
        if mask is None:
            return x, {}
        return (x, mask._asdict()) if self._drops_inside() else (dropout(x, *mask), {})

    def _drops_inside(self) -> bool:
        """Whether our kernels may make a mask where they multiply."""
        device = self.group.projections[0].weight.device
        return self.group.backend == "triton" or hopper_dots_safe(device) is None

    def groups(self) -> RowGroups:
        """By C++ where that is there."""
        return mixed_native.rows(self.group, self.tokens) or row_groups(self.group, self.tokens)

    def slots(self) -> RowSlots:
        return row_slots(self.group, self.tokens)


def _dropped(t: Tensor, mask: Mask | None) -> Tensor:
    return t if mask is None else dropout(t, *mask)
