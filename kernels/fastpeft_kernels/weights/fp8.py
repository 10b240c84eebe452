"""A frozen weight whose products are made in 8-bit floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fp8 import Fp8Rows, quantise_rows, scaled_product, unfit_shape
from .base import FrozenWeight, unflatten_weight
from .wrapped import WrappedWeight


class Fp8Weight(WrappedWeight):
    """Another weight, with copies in e4m3 beside it for products; values are the other's.

    `linear(x)` is q(x) q(W)^T with a scale for each row of x and of W; `linear_t(dy)` is q(dy) q(W^T)^T likewise, where
    there is a transposed copy. q rounds to 4 significant bits, by up to 1 part in 16; each copy takes a byte an
    element, and 4 a row.

    Args:
        base: the weight; read where values are asked for.
        rows: of `quantise_rows(W)`.
        columns: of `quantise_rows(W^T)`; None for `linear_t` of the ordinary kind.

    Raises:
        ValueError: shapes that do not fit each other, or are no multiples of 16.

    Source: Micikevicius et al. 2022, arXiv:2209.05433 (e4m3).
    """

    kind = "fp8_rows"

    def __init__(self, base: FrozenWeight, rows: Fp8Rows, columns: Fp8Rows | None = None) -> None:
        if (reason := unfit_shape(base.shape)) is not None:
            raise ValueError(f"base: expected a weight for products in FP8, got {reason}")
        for name, operand, shape in (("rows", rows, base.shape), ("columns", columns, base.shape[::-1])):
            if operand is not None and tuple(operand.codes.shape) != shape:
                raise ValueError(f"{name}: expected codes of shape {shape}, got {tuple(operand.codes.shape)}")
        super().__init__(base)
        self.rows, self.columns = rows, columns

    @classmethod
    def of(cls, base: FrozenWeight, backward: bool) -> Fp8Weight:
        """`base` with fresh copies; with one for `linear_t` where `backward`."""
        values = base.ready(base.dtype)
        values = base.decode(dtype=torch.float32) if values is None else values
        return cls(base, quantise_rows(values), quantise_rows(values.t()) if backward else None)

    def linear(self, x: Tensor, shared: dict[str, Any] | None = None) -> Tensor | None:
        made = {} if shared is None else shared
        if self.kind not in made:
            made[self.kind] = quantise_rows(x)
        return scaled_product(made[self.kind], self.rows, x.dtype)

    def linear_t(self, dy: Tensor) -> Tensor | None:
        return None if self.columns is None else scaled_product(quantise_rows(dy), self.columns, dy.dtype)

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        tensors, meta = self.base.flatten()
        copies = (*self.rows, *(self.columns or ()))
        return (*tensors, *copies), {"kind": self.base.kind, "meta": meta, "tensors": len(tensors)}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> Fp8Weight:
        count = meta["tensors"]
        base = unflatten_weight(meta["kind"], tuple(tensors[:count]), meta["meta"])
        codes, scale, *rest = tensors[count:]
        return cls(base, Fp8Rows(codes, scale), Fp8Rows(*rest) if rest else None)
