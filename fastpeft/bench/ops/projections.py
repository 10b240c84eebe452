"""Frozen projections with LoRA as each peer takes them, over the same tensors: functions, our op's, PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft_kernels.lora import LoraAdapter, LoraProjection
from fastpeft_kernels.quant import Packed4bit
from fastpeft_kernels.weights import DenseWeight, FourBitWeight

from .case import Direction, Floor, Forward, Inputs, Peer
from .four_bit import bitsandbytes_linear, decode, encode, stored_bytes
from .making import Numbers, floors, package

SCALE = 2.0  # lora_alpha / r


@dataclass(frozen=True)
class Linear:
    """One projection.

    Attributes:
        weight: (out_features, in_features), frozen; for the oracle of a 4-bit one its values.
        bias: (out_features,), frozen, or None.
        adapters: a (rank, in_features) and b (out_features, rank) of each, trained.
    """

    weight: Tensor | Packed4bit
    bias: Tensor | None
    adapters: Sequence[tuple[nn.Parameter, nn.Parameter]]

    def __call__(self, x: Tensor) -> Tensor:
        """In plain PyTorch, in x's dtype."""
        weight = self.weight if isinstance(self.weight, Tensor) else decode(self.weight, x.dtype)
        y = F.linear(x, weight, self.bias)
        for a, b in self.adapters:
            y = y + SCALE * F.linear(F.linear(x, a), b)
        return y

    def projection(self) -> LoraProjection:
        """As our op takes it."""
        weight = DenseWeight(self.weight) if isinstance(self.weight, Tensor) else FourBitWeight(self.weight)
        return LoraProjection(weight, self.bias, tuple(LoraAdapter(a, b, SCALE) for a, b in self.adapters))

    def layer(self) -> nn.Module:
        """torch's or bitsandbytes' layer, without adapters."""
        if isinstance(self.weight, Packed4bit):
            return bitsandbytes_linear(self.weight, self.bias)  # type: ignore[no-any-return]
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias, requires_grad=False)
        return layer


@dataclass(frozen=True)
class Plan:
    """What projections a case has.

    Attributes:
        sizes: (out_features, in_features) by name.
        tokens: rows of x.
        base: "dense", or "nf4" with nested scales.
        ranks: of the adapters of each projection.
        bias: whether each has one.
        chained: whether the last reads what an activation makes of the others' results, else all read x.
    """

    sizes: Mapping[str, tuple[int, int]]
    tokens: int
    base: str
    ranks: Sequence[int]
    bias: bool = False
    chained: bool = False

    @property
    def words(self) -> str:
        """For the case's name."""
        ranks = " + ".join(map(str, self.ranks))
        return f"{self.base}, r={ranks}, {self.tokens} tokens"

    def make(self, dtype: torch.dtype, device: str, into: torch.dtype, seed: int) -> Inputs:
        """Inputs of `OpCase.make`, of a case in `dtype`; extra["linears"] holds a `Linear` for each name."""
        numbers = Numbers(device, into, dtype, seed)
        widths = list(self.sizes.values())
        x = numbers.normal(self.tokens, widths[0][1]).requires_grad_()
        tensors, linears, trained = {"x": x}, {}, [x]
        for name, (rows, columns) in self.sizes.items():
            weight: Tensor | Packed4bit = numbers.normal(rows, columns, scale=columns**-0.5)
            if self.base == "nf4":
                packed = encode(weight.to(dtype))  # type: ignore[union-attr]
                weight = decode(packed, into) if into == torch.float64 else packed
            else:
                tensors[f"{name}.weight"] = weight  # type: ignore[assignment]
            bias = numbers.normal(rows) if self.bias else None
            adapters = []
            for i, rank in enumerate(self.ranks):
                a = nn.Parameter(numbers.normal(rank, columns, scale=columns**-0.5))
                b = nn.Parameter(numbers.normal(rows, rank, scale=0.1))
                adapters.append((a, b))
                tensors |= {f"{name}.a{i}": a, f"{name}.b{i}": b}
            trained += [each for pair in adapters for each in pair]
            linears[name] = Linear(weight, bias, adapters)
        dys = tuple(numbers.normal(self.tokens, rows) for rows, _ in (widths[-1:] if self.chained else widths))
        return Inputs(tensors, tuple(trained), dys, {"linears": linears})

    def floors(self, itemsize: int) -> dict[Direction, Floor]:
        """The frozen products once each way, without the weights' gradient; four products of rank r for two forward."""
        sizes, rank = list(self.sizes.values()), sum(self.ranks)
        frozen = 2.0 * self.tokens * sum(rows * columns for rows, columns in sizes)
        update = 2.0 * self.tokens * rank * sum(rows + columns for rows, columns in sizes)
        x = itemsize * self.tokens * sizes[0][1]
        y = itemsize * self.tokens * sum(rows for rows, _ in (sizes[-1:] if self.chained else sizes))
        adapters = itemsize * rank * sum(rows + columns for rows, columns in sizes)
        stored = stored_bytes if self.base == "nf4" else (lambda rows, columns: itemsize * rows * columns)
        weights = sum(stored(rows, columns) for rows, columns in sizes)
        operands = x + weights + adapters
        return floors((frozen + update, frozen + 2 * update), operands, y, operands, x + adapters)


def peft_model(module: nn.Module, linears: Mapping[str, Linear]) -> Any:
    """PEFT's model of a module that calls its children by the names of `linears`; they become its children.

    Raises:
        NotHereError: PEFT, or bitsandbytes for a 4-bit base, is not installed.
    """
    peft = package("peft")
    for name, linear in linears.items():
        setattr(module, name, linear.layer())
    # as transformers marks it, so that PEFT takes its layer for 4 bits
    module.is_loaded_in_4bit = any(isinstance(each.weight, Packed4bit) for each in linears.values())  # type: ignore[assignment]
    first = next(iter(linears.values()))
    names = [f"adapter_{i}" for i in range(len(first.adapters))]
    model: Any = None
    for name, (a, _) in zip(names, first.adapters, strict=True):
        rank = a.shape[0]
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=list(linears), init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(module, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    for key, linear in linears.items():
        layer = model.get_base_model().get_submodule(key)
        for name, (a, b) in zip(names, linear.adapters, strict=True):
            layer.lora_A[name].weight, layer.lora_B[name].weight = a, b
    return model.train()


def by_layers(module: Callable[[], nn.Module], accelerated: bool = False) -> Peer:
    """PEFT's layers as they come, or accelerated: then an AssertionError where any is left to PEFT."""

    def peer(inputs: Inputs) -> Forward:
        model, x = peft_model(module(), inputs.extra["linears"]), inputs.tensors["x"]
        if accelerated:
            _accelerate(model, x)
        return lambda: _tuple(model(x))

    return peer


def _accelerate(model: Any, x: Tensor) -> None:
    import fastpeft

    fastpeft.accelerate(model)
    model(x)  # finds what is computed together
    report = fastpeft.report(model)
    if report.left or not report.rows or any(row.note for row in report.rows):
        raise AssertionError(f"not all is served:\n{report}")


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def compiled_group() -> None:
    """Small groups on a CPU are computed by C++, which a process first has to compile or to find."""
    from fastpeft_kernels.native.extension import group_extension

    group_extension(wait=True)
