"""transformers' FP8Linear (fine-grained FP8 checkpoints) as a frozen weight.

Its own product quantises x too, to e4m3 in blocks along a row, by kernels for GPUs. By default that product is called;
where `accelerate(fp8_compute=...)` was asked for, the weight is decoded and x stays as it is, or products are ours.
Backward always decodes: dX = dY W.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import ScaledWeight

from .reading import PRODUCTS, Base, dense

MODULE = "transformers.integrations.finegrained_fp8"


class FineGrainedWeight(ScaledWeight):
    """A ScaledWeight whose product is transformers' own.

    Args:
        codes: float8_e4m3fn (out_features, in_features).
        scale: (row blocks, column blocks), as stored.
        activation_scale: of x, where it is not made anew for each call; or None.
        blocks: (rows, columns) of a block; None for one scale.
        dtype: of the layer's products.
        deepgemm: whether the library may choose DeepGEMM's kernels.
    """

    kind = "transformers_fp8"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        activation_scale: Tensor | None,
        blocks: tuple[int, int] | None,
        dtype: torch.dtype,
        deepgemm: bool = True,
    ) -> None:
        super().__init__(codes, _matrix(scale), block=blocks or _one_block(codes), dtype=dtype)
        self.stored, self.activation_scale = scale, activation_scale
        self.blocks, self.deepgemm = blocks, deepgemm

    def linear(self, x: Tensor, shared: dict[str, Any] | None = None) -> Tensor | None:
        if not x.numel():
            return None
        product = sys.modules[MODULE].fp8_linear
        asked = {"output_dtype": x.dtype, "allow_deepgemm": self.deepgemm}  # of one version or another
        known = {name: value for name, value in asked.items() if name in inspect.signature(product).parameters}
        block_size = None if self.blocks is None else list(self.blocks)
        return product(  # type: ignore[no-any-return]
            x, self.codes, self.stored, block_size=block_size, activation_scale=self.activation_scale, **known
        )

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        dtype = str(self.dtype).removeprefix("torch.")
        meta = {"blocks": self.blocks and list(self.blocks), "dtype": dtype, "deepgemm": self.deepgemm}
        tensors = (self.codes, self.stored)
        return tensors if self.activation_scale is None else (*tensors, self.activation_scale), meta

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> FineGrainedWeight:
        codes, scale, *rest = tensors
        blocks = meta["blocks"] and (meta["blocks"][0], meta["blocks"][1])
        return cls(codes, scale, rest[0] if rest else None, blocks, getattr(torch, meta["dtype"]), meta["deepgemm"])


def reads(layer: type[nn.Module], weight: type) -> bool:
    module = sys.modules.get(MODULE)
    return module is not None and layer is module.FP8Linear and weight is nn.Parameter


def name(layer: Any) -> str:
    return "transformers FP8"


def frozen_base(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """The library's product is in the dtype of x, which autocast does not change; decoded it is like a matrix."""
    weight, scale, static = layer.weight, layer.weight_scale_inv, getattr(layer, "activation_scale", None)
    if weight.requires_grad:
        return "the base weight is trained"
    if weight.dtype != torch.float8_e4m3fn:
        return f"a weight in {weight.dtype}"
    codes, scale = weight.detach(), scale.detach()
    blocks = layer.block_size
    blocks = None if blocks is None else (int(blocks[0]), int(blocks[1]))
    if layer.__dict__.get(PRODUCTS) is not None:
        dtype = autocast or x.dtype
        return ScaledWeight(codes, _matrix(scale), block=blocks or _one_block(codes), dtype=dtype), dtype, dtype
    if not hasattr(sys.modules[MODULE], "fp8_linear"):
        return "a version of transformers without fp8_linear"
    deepgemm = not getattr(layer, "_deepgemm_disabled", False)
    static = None if static is None else static.detach()
    return FineGrainedWeight(codes, scale, static, blocks, x.dtype, deepgemm), x.dtype, x.dtype


def dense_linear(layer: Any) -> nn.Linear:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    decode: Any = Fp8Dequantize(None)
    return dense(layer, decode._dequantize_one(layer.weight, _matrix(layer.weight_scale_inv), torch.float32))


def _matrix(scale: Tensor) -> Tensor:
    """One for each block."""
    return scale if scale.dim() == 2 else scale.reshape(1, 1)


def _one_block(codes: Tensor) -> tuple[int, int]:
    return max(1, codes.shape[0]), max(1, codes.shape[1])
