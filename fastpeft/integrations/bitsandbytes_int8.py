"""bitsandbytes' Linear8bitLt (LLM.int8) as a frozen weight.

Source: Dettmers et al. 2022, arXiv:2208.07339. The library quantises x too, row by row, but for columns that hold a
value above a threshold. On a CPU in training mode it does not, and multiplies by the decoded weight. Backward always
does: dX = dY W.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import ScaledWeight

from .reading import Base, dense


class LlmInt8Weight(ScaledWeight):
    """A ScaledWeight, scales for rows, whose product is bitsandbytes' own.

    Args:
        codes: int8 (out_features, in_features).
        absmax: fp32 (out_features,), the magnitude that 127 stands for.
        threshold: from which magnitude an element of x keeps its column out of int8; 0 for never; None for a product
            with the decoded weight.
        dtype: nominal, of the layer's products.
    """

    kind = "bitsandbytes_int8"

    def __init__(self, codes: Tensor, absmax: Tensor, threshold: float | None, dtype: torch.dtype) -> None:
        super().__init__(codes, absmax.view(-1, 1), block=(1, codes.shape[1]), dtype=dtype, factor=1.0 / 127.0)
        self.threshold = threshold

    @property
    def row_by_row(self) -> bool:  # type: ignore[override]
        """Not where a value above the threshold keeps its column of all rows out of int8."""
        return not self.threshold

    def linear(self, x: Tensor, shared: dict[str, Any] | None = None) -> Tensor | None:
        if self.threshold is None or not x.numel():
            return None
        ops = torch.ops.bitsandbytes
        # A copy: on a CPU the op writes into its input, and puts back what it was
        half = x.to(torch.float16, copy=True)
        codes, row_scale, outliers = ops.int8_vectorwise_quant(half, self.threshold)
        scale = self.scale.view(-1)
        if self.threshold > 0.0:
            return ops.int8_mixed_scaled_mm(x, codes, self.codes, row_scale, scale, outliers, None)[0]  # type: ignore[no-any-return]
        return ops.int8_scaled_mm(codes, self.codes, row_scale, scale, None, x.dtype)  # type: ignore[no-any-return]

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        tensors, meta = super().flatten()
        return tensors, {"dtype": meta["dtype"], "threshold": self.threshold}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> LlmInt8Weight:
        return cls(tensors[0], tensors[1].view(-1), meta["threshold"], getattr(torch, meta["dtype"]))


def reads(layer: type[nn.Module], weight: type) -> bool:
    module = sys.modules.get("bitsandbytes.nn.modules")
    return module is not None and layer is module.Linear8bitLt


def name(layer: Any) -> str:
    return "LLM.int8"


def frozen_base(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """As MatMul8bitFp on a CPU in training, else as MatMul8bitLt, whose product autocast does not change."""
    state = layer.state
    if state.has_fp16_weights:
        return "a weight that is kept in 16 bits and quantised at each call (has_fp16_weights)"
    codes, absmax = _stored(layer)
    if codes is None or absmax is None or codes.dtype != torch.int8:
        return "a weight that is not quantised yet"
    decodes = layer.training and x.device.type in ("cpu", "xpu")
    dtype = autocast or x.dtype if decodes else x.dtype
    return LlmInt8Weight(codes, absmax, None if decodes else float(state.threshold), dtype), dtype, dtype


def dense_linear(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return dense(layer, int8_vectorwise_dequant(*_stored(layer)))


def _stored(layer: Any) -> tuple[Any, Any]:
    """(codes, absmax): with the parameter until the first forward, in the layer's state from then on."""
    weight, state = layer.weight, layer.state
    codes = getattr(weight, "CB", None)
    return (codes, weight.SCB) if codes is not None else (state.CB, state.SCB)
