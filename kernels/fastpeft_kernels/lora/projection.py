"""What a LoRA op works on: projections of one input, each a frozen weight with any number of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.device import product_dtype
from ..common.shapes import imitated
from ..common.validation import FLOATING, check_device, check_floating, check_instance, check_scaling, check_tensor
from ..weights import FrozenWeight


@dataclass(frozen=True, eq=False, slots=True)
class LoraAdapter:
    """One low-rank update: scaling * (dropout(x) @ a.T @ b.T + bias).

    Attributes:
        a: (rank, in_features), floating.
        b: (out_features, rank), dtype of `a`.
        scaling: factor of the update; a float, or a 0-d tensor that stays on its device.
        bias: (out_features,) or None; PEFT's `lora_bias`.
        dropout: probability of dropping an element of x before `a`, in [0, 1).
        index: in a mixed batch, the number in `Group.adapter_index` of the rows that it serves.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None
    dropout: float = 0.0
    index: int = 0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def scaling_on(self, device: torch.device) -> float | Tensor:
        """The scaling as a tensor where it is one on this device, to be read there, else as a number."""
        if isinstance(self.scaling, Tensor) and self.scaling.device == device:
            return self.scaling.detach()
        return float(self.scaling)


@dataclass(frozen=True, eq=False, slots=True)
class LoraProjection:
    """A frozen linear map with its active adapters; with none it is a plain linear map.

    Attributes:
        weight: FrozenWeight of shape (out_features, in_features).
        bias: (out_features,) or None; may be trained.
        adapters: the active adapters, in the order in which they are summed.
        magnitude: (out_features,) or None; DoRA's norms of the adapted weight's rows, with one adapter without bias.
    """

    weight: FrozenWeight
    bias: Tensor | None = None
    adapters: tuple[LoraAdapter, ...] = ()
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Sum of the adapters' ranks."""
        adapters = self.adapters
        return adapters[0].a.shape[0] if len(adapters) == 1 else sum([adapter.a.shape[0] for adapter in adapters])

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd tracks: the bias, then a, b and bias of each adapter, then the magnitude."""
        found: list[Tensor | None] = [self.bias]
        for adapter in self.adapters:
            found += (adapter.a, adapter.b, adapter.bias)
        return (*found, self.magnitude)


def trains_a(flags: Sequence[bool]) -> bool:
    """Whether any of these, one for each of a projection's `tensors()`, is of an adapter's a."""
    return any(flags[1:-1:3])


def trains_b(flags: Sequence[bool]) -> bool:
    """Whether any is of an adapter's b."""
    return any(flags[2:-1:3])


FEW_TOKENS = 8
"""Measured on an EPYC with AVX2, 5632 x 2048 in bf16, in 16 bits and by fp32: 13.7 and 18.4 ms at 4, 27 and 26 at 8."""


def few_without_gradients(x: Tensor) -> bool:
    """Whether x (..., in_features) is what a model is called with for each token that it generates."""
    return not torch.is_grad_enabled() and x.numel() <= FEW_TOKENS * x.shape[-1]


@dataclass(frozen=True, slots=True)
class Dtypes:
    """compute: of the frozen product. lora: of the adapters' products. out: of the result."""

    compute: torch.dtype
    lora: torch.dtype
    out: torch.dtype

    def for_input(self, x: Tensor) -> Dtypes:
        """`on` x's device, unless x is a few tokens without gradients: casting the weights would cost more."""
        return self if few_without_gradients(x) else self.on(x.device)

    def cast_once(self, x: Tensor) -> Tensor:
        """x in the dtype of the products, where one cast serves every product, now and in backward."""
        return x.to(self.compute) if self.compute == self.lora and x.dtype.itemsize >= self.compute.itemsize else x

    def on(self, device: torch.device) -> Dtypes:
        """The same results from products in the dtypes that `device` is fast in; see `product_dtype`."""
        if device.type != "cpu":
            return self
        return Dtypes(product_dtype(self.compute, device), product_dtype(self.lora, device), self.out)


class Mask(NamedTuple):
    """Dropout of one adapter's input, as `common.random.dropout` takes it."""

    seed: Tensor
    p: float
    stream: int


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Projections of one input, in given dtypes, with one dropout mask each.

    Attributes:
        projections: in the order of their outputs.
        dtypes: of all their products.
        seeds: seeds[i] is int64 (1,), or None where projection i drops nothing.
        backend: one of `backends.BACKENDS`.
        adapter_index: of a mixed batch, the `index` of each row's own adapter, the tokens being those of so many rows,
            one after the other; a number that no adapter has means none. Where it is None, every adapter serves every
            token.
        served: what `direct.serves` found out of it.
        native: the same as C++ takes it, once `direct` has made it.
        one_a: all adapters' a are the same frozen matrix (`have_one_a`), which is multiplied once: S is (tokens, rank).
    """

    projections: Sequence[LoraProjection]
    dtypes: Dtypes
    seeds: Sequence[Tensor | None]
    backend: str = "auto"
    adapter_index: tuple[int, ...] | None = None
    one_a: bool = False
    served: dict[Any, str | None] = field(default_factory=dict, init=False, repr=False)
    native: list[Any] = field(default_factory=list, init=False, repr=False)
    _widths: Sequence[int] = field(init=False, repr=False)
    _numbers: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.adapter_index is None:
            widths, numbers = [projection.rank for projection in self.projections], []
        else:
            widths = [max([adapter.a.shape[0] for adapter in p.adapters], default=0) for p in self.projections]
            numbers = [tuple([adapter.index for adapter in p.adapters]) for p in self.projections]
        object.__setattr__(self, "_widths", tuple(widths))
        object.__setattr__(self, "_numbers", tuple(numbers))

    @property
    def drops(self) -> bool:
        """Whether any adapter's input loses elements."""
        return any([seed is not None for seed in self.seeds])

    @property
    def large_backend(self) -> str:
        """The backend of the products with the weights: a mixed batch leaves them to the library unless told otherwise.

        On an H200 its step took 0.92 and 0.96 of one in which our kernels made the gradients of siblings' inputs.
        """
        return "library" if self.backend == "auto" and self.adapter_index is not None else self.backend

    def widths(self) -> Sequence[int]:
        """How many columns of S each projection has: in a mixed batch those of its largest adapter."""
        return self._widths

    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """In a mixed batch: the `index` of each projection's adapters."""
        return self._numbers

    def mask(self, i: int) -> Mask | None:
        """Of the first adapter of projection i, which is its only one where it has a magnitude."""
        seed, p = self.seeds[i], self.projections[i].adapters[0].dropout
        return None if seed is None or p == 0.0 else Mask(seed, p, 0)

    def masks(self) -> Iterator[Mask]:
        """Of the adapters whose input loses elements."""
        return (mask for _, _, mask, _ in self.adapter_columns() if mask is not None)

    def adapter_columns(self) -> Iterator[tuple[int, int, Mask | None, bool]]:
        """(first, last, mask, whole) of every adapter's columns of S.

        whole: elements are dropped of the frozen product's input too, and `dora` makes what is made of them.
        """
        last = 0
        for projection, seed in zip(self.projections, self.seeds, strict=True):
            for stream, adapter in enumerate(projection.adapters):
                first, last = last, last + adapter.rank
                mask = None if seed is None or adapter.dropout == 0.0 else Mask(seed, adapter.dropout, stream)
                yield first, last, mask, mask is not None and projection.magnitude is not None


def have_one_a(projections: Sequence[LoraProjection], seeds: Sequence[Tensor | None]) -> bool:
    """Whether several projections have one adapter each, and of the same frozen a, as with VeRA, without dropout."""
    adapted = [projection for projection in projections if projection.adapters]
    if len(adapted) < 2 or adapted[0].adapters[0].a.requires_grad or any(seed is not None for seed in seeds):
        return False
    first = adapted[0].adapters[0].a
    return all(
        len(p.adapters) == 1 and p.magnitude is None and _is_view_of_the_same(p.adapters[0].a, first) for p in adapted
    )


def _is_view_of_the_same(a: Tensor, b: Tensor) -> bool:
    if a.requires_grad or a.dtype != b.dtype:
        return False
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


@dataclass(slots=True, eq=False)
class Packed:
    """A group's adapters as the products take them, in the adapters' compute dtype; `mixed_packing.pack` makes stacks.

    Attributes:
        a: (total rank, in_features), all adapters under each other, or the one of `Group.one_a`; None without adapters.
        b: scaling * B of each projection, (out_features, its rank), or None.
        bias: summed scaling * bias of each projection's adapters, (out_features,), or None.
    """

    a: Tensor | None
    b: list[Tensor | None]
    bias: list[Tensor | None]


def check_group(x: Tensor, projections: Sequence[LoraProjection]) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the projections fit `x` and each other."""
    check_floating("x", x)
    if x.dtype not in FLOATING:
        raise TypeError(f"x: expected a dtype of {FLOATING}, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError("x: expected shape (..., in_features), got a 0-d tensor")
    check_instance("projections", projections, list, tuple)
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    for i, projection in enumerate(projections):
        check_instance(f"projections[{i}]", projection, LoraProjection)
        _check_projection(x, projection, f"projections[{i}]")
    if x.device.type == "meta" and not imitated(x.device):
        raise ValueError("x: expected a tensor with values, got one on the meta device")


def _check_projection(x: Tensor, projection: LoraProjection, name: str) -> None:
    if not isinstance(projection.weight, FrozenWeight):
        raise TypeError(f"{name}.weight: expected a FrozenWeight, got {type(projection.weight).__name__}")
    out_features, in_features = projection.weight.shape
    if in_features < 1:
        raise ValueError(f"{name}.weight: expected in_features >= 1, got shape {projection.weight.shape}")
    if x.shape[-1] != in_features:
        raise ValueError(f"x: expected last size {in_features} for {name}, got shape {tuple(x.shape)}")
    check_device(f"{name}.weight", projection.weight.device, x.device)
    if projection.bias is not None:
        check_tensor(f"{name}.bias", projection.bias, x.device, (out_features,))
    check_instance(f"{name}.adapters", projection.adapters, tuple, list)
    for j, adapter in enumerate(projection.adapters):
        where = f"{name}.adapters[{j}]"
        check_instance(where, adapter, LoraAdapter)
        check_instance(f"{where}.a", adapter.a, Tensor)
        if adapter.a.dim() != 2 or adapter.a.shape[0] < 1:
            raise ValueError(f"{where}.a: expected (rank >= 1, {in_features}), got {tuple(adapter.a.shape)}")
        check_tensor(f"{where}.a", adapter.a, x.device, (adapter.rank, in_features))
        check_tensor(f"{where}.b", adapter.b, x.device, (out_features, adapter.rank))
        if adapter.b.dtype != adapter.a.dtype:
            raise TypeError(f"{where}.b: expected the dtype of a, {adapter.a.dtype}, got {adapter.b.dtype}")
        if adapter.bias is not None:
            check_tensor(f"{where}.bias", adapter.bias, x.device, (out_features,))
        check_scaling(f"{where}.scaling", adapter.scaling, x.device)
        check_instance(f"{where}.dropout", adapter.dropout, float, int)
        if not 0.0 <= adapter.dropout < 1.0:
            raise ValueError(f"{where}.dropout: expected a probability in [0, 1), got {adapter.dropout}")
    if projection.magnitude is not None:
        check_tensor(f"{name}.magnitude", projection.magnitude, x.device, (out_features,))
        if len(projection.adapters) != 1 or projection.adapters[0].bias is not None:
            raise ValueError(
                f"{name}.magnitude: expected one adapter without bias, got {len(projection.adapters)}, "
                f"{sum(adapter.bias is not None for adapter in projection.adapters)} with bias"
            )
