"""Groups of projections drawn by hypothesis: what they are made of is drawn, their numbers come from torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.lora import LoraAdapter, LoraProjection
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.quant.storage import BLOCKSIZES, QUANT_TYPES
from fastpeft_kernels.weights import DenseWeight, FourBitWeight, FrozenWeight

Numbers = Callable[..., Tensor]
RANKS = st.one_of(st.integers(1, 12), st.sampled_from([64, 512]))


def whole(*shape: int) -> Tensor:
    """Numbers of which sums of products are exact in fp32."""
    return torch.randint(-2, 3, shape).float()


def normal(*shape: int) -> Tensor:
    """Numbers that keep their size from product to product."""
    return torch.randn(shape) / max(shape[-1] if len(shape) > 1 else 1, 1) ** 0.5


@dataclass(frozen=True)
class FourBit:
    quant_type: str
    blocksize: int
    nested: bool

    def make(self, values: Tensor, numbers: Numbers) -> FrozenWeight:
        packed = encode_4bit(values, self.quant_type, self.blocksize, self.nested)
        if numbers is whole:  # the same storage, its tables and scales whole numbers
            if self.nested:
                names = {"nested_absmax": packed.nested_absmax, "nested_code": packed.nested_code}
                names["nested_offset"] = packed.nested_offset
            else:
                names = {"absmax": packed.absmax}
            packed = replace(
                packed, code=torch.arange(-7.0, 9.0), **{k: whole(*t.shape).abs() for k, t in names.items()}
            )
        return FourBitWeight(packed)


@dataclass(frozen=True)
class Adapter:
    rank: int
    scaling: float
    scaling_is_tensor: bool
    bias: bool
    dropout: float
    trained: tuple[bool, bool, bool]

    def make(self, out: int, features: int, numbers: Numbers, dtype: torch.dtype, index: int) -> LoraAdapter:
        sizes = ((self.rank, features), (out, self.rank), (out,))
        a, b, bias = (numbers(*s).to(dtype).requires_grad_(t) for s, t in zip(sizes, self.trained, strict=True))
        scaling = torch.tensor(self.scaling) if self.scaling_is_tensor else self.scaling
        return LoraAdapter(a, b, scaling, bias if self.bias else None, self.dropout, index)


@dataclass(frozen=True)
class Projection:
    out_features: int
    storage: FourBit | None
    bias: str
    adapters: list[Adapter]
    magnitude: str = "none"

    def without_lora_bias(self) -> Projection:
        return replace(self, adapters=[replace(adapter, bias=False) for adapter in self.adapters])

    def make(self, features: int, numbers: Numbers, dtype: torch.dtype, lora: torch.dtype) -> LoraProjection:
        values = numbers(self.out_features, features)
        weight = DenseWeight(values.to(dtype)) if self.storage is None else self.storage.make(values, numbers)
        bias = None if self.bias == "none" else numbers(self.out_features).to(dtype)
        if bias is not None and self.bias == "trained":
            bias.requires_grad_()
        made = (self.out_features, features, numbers, lora)
        adapters = tuple(adapter.make(*made, index) for index, adapter in enumerate(self.adapters))
        if self.magnitude == "none" or len(adapters) != 1:
            return LoraProjection(weight, bias, adapters)
        magnitude = (0.5 + torch.rand(self.out_features)).to(lora).requires_grad_(self.magnitude == "trained")
        return LoraProjection(weight, bias, (replace(adapters[0], bias=None),), magnitude)


def adapters(ranks: st.SearchStrategy[int] = RANKS) -> st.SearchStrategy[Adapter]:
    return st.builds(
        Adapter,
        rank=ranks,
        scaling=st.sampled_from([1.0, 2.0, -0.5]),
        scaling_is_tensor=st.booleans(),
        bias=st.booleans(),
        dropout=st.sampled_from([0.0, 0.0, 0.5, 0.75]),
        trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    )


def projections(
    out_features: st.SearchStrategy[int],
    ranks: st.SearchStrategy[int] = RANKS,
    most: int = 2,
    magnitude: st.SearchStrategy[str] | None = None,
) -> st.SearchStrategy[Projection]:
    storage = st.builds(FourBit, st.sampled_from(QUANT_TYPES), st.sampled_from(BLOCKSIZES), st.booleans())
    return st.builds(
        Projection,
        out_features=out_features,
        storage=st.one_of(st.none(), storage),
        bias=st.sampled_from(["none", "frozen", "trained"]),
        adapters=st.lists(adapters(ranks), min_size=int(most == 1), max_size=most),
        magnitude=st.just("none") if magnitude is None else magnitude,
    )


LEADING_SIZES = st.one_of(
    st.sampled_from([(), (0,), (1,), (2, 0), (1, 1)]),
    st.tuples(st.integers(2, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 5)),
)
"""Of x, before its features: none, no tokens, one, several dimensions."""
MANY_TOKENS = st.sampled_from([(24,), (37,), (3, 11)])
"""Enough for two computations' errors to be compared: of a few numbers either may be the closer one by chance."""
LAYOUTS = st.tuples(*[st.sampled_from(["plain", "transposed", "strided", "expanded"])] * 2)
"""Of x and of the outputs' gradients."""


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same shape, in other memory; expanded: one row for all."""
    if values.dim() < 2 or values.numel() == 0 or layout == "plain":
        return values
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return values.repeat_interleave(2, -1)[..., ::2]
    return values[..., :1, :].expand(values.shape)
