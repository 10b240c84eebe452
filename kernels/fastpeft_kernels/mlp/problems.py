"""An MLP's activation with the products of its adapters that read what it reads, as a problem to be timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..activation.api import fill_gated_activation_backward
from ..activation.reference import gated_activation_reference
from ..lora import LoraAdapter, LoraProjection
from ..lora import library as lora
from ..lora.projection import Dtypes
from ..tuning.choosing import forced
from ..tuning.measuring import Tunable
from ..weights import DenseWeight
from . import fused, library
from .structure import Mlp

_OTHER = 16
"""Size of the MLP's input and output, which no product here reads."""
_TRAINED = [False, True, True, False, False]


class _Activation:
    """Forward, S of the down projection; backward, dS and dB of gate and up, and dA of down. Its own pass both ways."""

    def __init__(self, key: fused.FusedKey, device: torch.device) -> None:
        def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        def projection(out_features: int, in_features: int) -> LoraProjection:
            a, b = rand(fused.MAX_RANK, in_features) / in_features**0.5, rand(out_features, fused.MAX_RANK)
            weight = torch.empty((out_features, in_features), dtype=dtype, device=device)
            return LoraProjection(DenseWeight(weight), None, (LoraAdapter(a, b / out_features**0.5),))

        dtype, features = getattr(torch, key.dtype), key.features
        inner = tuple([projection(features, _OTHER) for _ in range(1 + key.gated)])
        self.mlp = Mlp(inner, projection(_OTHER, features), key.activation)
        self.inner, self.down = self.mlp.groups(Dtypes(dtype, dtype, dtype), [None] * (1 + len(inner)))
        self.packed = lora.pack(self.inner)
        self.needs = [_TRAINED] * (1 + len(inner))
        self.pre = rand(key.tokens, self.mlp.width, dtype=dtype)
        self.dh = rand(key.tokens, features, dtype=dtype)
        self.s = rand(key.tokens, fused.MAX_RANK * len(inner), dtype=dtype)
        self.ds_down = rand(key.tokens, fused.MAX_RANK, dtype=dtype)
        self.dpre = torch.empty_like(self.pre)

    def run(self, candidate: str) -> Sequence[Tensor]:
        with torch.no_grad(), forced({fused.FUSED: candidate}):
            middle = library.middle(self.pre, self.mlp, self.down, ())
            found = fused.activation_backward(
                self.dh, self.pre, self.dpre, self.s, self.ds_down, self.mlp, self.inner, self.packed, self.needs, False
            )
            if (found is None) == (candidate == "fused"):
                raise RuntimeError(f"{candidate} was asked for and is not what ran")
            found = self._apart() if found is None else found
        assert middle.s_down is not None and found.da_down is not None
        dbs = [grads[2] for grads in found.inner]
        results = [middle.h, middle.s_down, self.dpre, found.ds, found.da_down, *dbs]
        return [t for t in results if t is not None]

    def _apart(self) -> fused.Gradients:
        h, (dgate, dup) = torch.empty_like(self.dh), self.mlp.halves(self.dpre)
        fill_gated_activation_backward(self.dh, *self.mlp.halves(self.pre), self.mlp.activation, dgate, dup, h)
        dys, needs = self.mlp.columns(self.dpre), self.needs[:-1]
        _, ds, grads = lora.backward_without_input(self.s, dys, self.inner, self.packed, None, needs)
        of_down: list[list[Tensor | None]] = [[None] * len(_TRAINED)]
        lora.down_gradients(self.ds_down, h, self.down, self.needs[-1:], of_down)
        assert ds is not None
        return fused.Gradients(ds, grads, of_down[0][1])

    def exact(self) -> Sequence[Tensor]:
        pre = self.pre.double().requires_grad_()
        h = gated_activation_reference(*self.mlp.halves(pre), self.mlp.activation)
        (dpre,) = torch.autograd.grad(h, pre, self.dh.double())
        h, s, dys = h.detach(), self.s.double(), self.mlp.columns(dpre)
        ups = [b.double() for b in self.packed.b if b is not None]
        ds = torch.cat([dy @ b for dy, b in zip(dys, ups, strict=True)], dim=1)
        dbs = [dy.t() @ part for dy, part in zip(dys, s.split(fused.MAX_RANK, dim=1), strict=True)]
        a = self.mlp.down.adapters[0].a.to(self.pre.dtype).double()
        return [h, h @ a.t(), dpre, ds, self.ds_down.double().t() @ h, *dbs]


TUNABLES = (Tunable(fused.FUSED, fused.FusedKey, fused.candidates, _Activation),)
