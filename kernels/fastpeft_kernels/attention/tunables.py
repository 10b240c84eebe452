"""Attention as problems to be timed, with gradients where the case has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tuning.measuring import Tunable
from .api import attention
from .candidates.registry import named
from .choosing import attention_backends, masked_backends
from .keys import MASKED, OP, AttentionKey, MaskedKey
from .masks import Mask
from .ranges import packed
from .reference import attention_reference
from .scores import Scores

_DOCUMENTS = 8
_SOFTCAP = 50.0  # Gemma 2's


class _Attention:
    """Random numbers of the key's sizes, laid out as projections give them; an eighth of the keys is padding."""

    def __init__(self, key: AttentionKey, device: torch.device) -> None:
        self.mask = Mask(
            right=0 if key.mask == "causal" else None,
            keys=_marks(key.batch, key.keys, device) if key.mask == "keys" else None,
            dense=torch.rand((1, 1, key.queries, key.keys), device=device) > 0.5 if key.mask == "dense" else None,
        )
        self.scores = Scores(key.features**-0.5)
        self.gradients = key.gradients
        shapes = ((key.queries, key.heads), (key.keys, key.kv_heads), (key.keys, key.kv_heads))
        self.inputs = [
            _tensor((key.batch, *shape, key.features), key.dtype, device).requires_grad_(key.gradients)
            for shape in shapes
        ]
        self.dout = torch.randn_like(self.inputs[0])

    def run(self, candidate: str) -> Sequence[Tensor]:
        """Raises where the candidate does not serve: it is measured as nothing else."""
        q, k, v = self.inputs
        given = {name: getattr(self.scores, name) for name in ("scale", "softcap", "sinks")}
        out = attention(q, k, v, mask=self.mask, backend=named(candidate), **given)
        assert isinstance(out, Tensor)
        return self._with_gradients(out, self.inputs, self.dout)

    def exact(self) -> Sequence[Tensor]:
        inputs = [x.detach().double().requires_grad_(self.gradients) for x in self.inputs]
        q, k, v = inputs
        out, _ = attention_reference(q, k, v, self.mask, self.scores)
        return self._with_gradients(out, inputs, self.dout.double())

    def _with_gradients(self, out: Tensor, inputs: list[Tensor], dout: Tensor) -> Sequence[Tensor]:
        return [out.detach(), *(torch.autograd.grad(out, inputs, dout) if self.gradients else ())]


class _Masked(_Attention):
    """The same with the parts of a mask that PyTorch's own cannot have; intervals are eight causal documents a row."""

    def __init__(self, key: MaskedKey, device: torch.device) -> None:
        plain = AttentionKey(*key[:6], "all", key.gradients, key.dtype)
        super().__init__(plain, device)
        if key.v_features != key.features:
            self.inputs[2] = _tensor((key.batch, key.keys, key.kv_heads, key.v_features), key.dtype, device)
            self.inputs[2].requires_grad_(key.gradients)
            self.dout = _tensor((key.batch, key.queries, key.heads, key.v_features), key.dtype, device)
        cut = Mask()
        if key.intervals:
            edges = [torch.arange(_DOCUMENTS + 1, device=device) * n // _DOCUMENTS for n in (key.queries, key.keys)]
            cut = packed(edges[0], key.queries, edges[1], key.keys, causal=True)
        self.mask = Mask(
            left=None if key.left < 0 else key.left - 1,
            right=None if key.right < 0 else key.right - 1,
            start=cut.start,
            stop=cut.stop,
            keys=_marks(key.batch, key.keys, device) if key.marks else None,
        )
        sinks = torch.randn(key.heads, device=device).to(getattr(torch, key.dtype)) if key.sinks else None
        self.scores = Scores(key.features**-0.5, softcap=_SOFTCAP if key.softcap else None, sinks=sinks)


def _tensor(shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    """(batch, heads, tokens, features) of (batch, tokens, heads, features)."""
    return torch.randn(shape, device=device).to(getattr(torch, dtype)).transpose(1, 2)


def _marks(batch: int, keys: int, device: torch.device) -> Tensor:
    return torch.rand((batch, keys), device=device) > 0.125


TUNABLES = (
    Tunable(OP, AttentionKey, attention_backends, _Attention),
    Tunable(MASKED, MaskedKey, masked_backends, _Masked),
)
