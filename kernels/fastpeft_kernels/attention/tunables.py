"""Attention that PyTorch's own could serve as problems to be timed, with gradients where the case has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tuning.choosing import forced
from ..tuning.measuring import Tunable
from .api import attention
from .choosing import OP, AttentionKey, attention_backends
from .masks import Mask
from .reference import attention_reference
from .scores import Scores


class _Attention:
    """Random numbers of the key's sizes, laid out as projections give them; an eighth of the keys is padding."""

    def __init__(self, key: AttentionKey, device: torch.device) -> None:
        self.gradients = key.gradients
        shapes = ((key.queries, key.heads), (key.keys, key.kv_heads), (key.keys, key.kv_heads))
        self.inputs = [
            torch.randn((key.batch, tokens, heads, key.features), device=device)
            .to(getattr(torch, key.dtype))
            .transpose(1, 2)
            .requires_grad_(key.gradients)
            for tokens, heads in shapes
        ]
        self.dout = torch.randn_like(self.inputs[0])
        self.mask = Mask(
            right=0 if key.mask == "causal" else None,
            keys=torch.rand((key.batch, key.keys), device=device) > 0.125 if key.mask == "keys" else None,
            dense=torch.rand((1, 1, key.queries, key.keys), device=device) > 0.5 if key.mask == "dense" else None,
        )

    def run(self, candidate: str) -> Sequence[Tensor]:
        with forced({OP: candidate}):
            out = attention(*self.inputs, mask=self.mask)
        assert isinstance(out, Tensor)
        return self._with_gradients(out, self.inputs, self.dout)

    def exact(self) -> Sequence[Tensor]:
        inputs = [x.detach().double().requires_grad_(self.gradients) for x in self.inputs]
        q, k, v = inputs
        out, _ = attention_reference(q, k, v, self.mask, Scores(q.shape[3] ** -0.5))
        return self._with_gradients(out, inputs, self.dout.double())

    def _with_gradients(self, out: Tensor, inputs: list[Tensor], dout: Tensor) -> Sequence[Tensor]:
        return [out.detach(), *(torch.autograd.grad(out, inputs, dout) if self.gradients else ())]


TUNABLES = (Tunable(OP, AttentionKey, attention_backends, _Attention),)
