"""Quantised layers of several libraries in place of a model's linear ones, made on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .left_out import NotHereError
from .steps import nf4_linear

Quantise = Callable[[nn.Linear], nn.Module]


def llm_int8(linear: nn.Linear, threshold: float = 6.0) -> nn.Module:
    """bitsandbytes' Linear8bitLt."""
    bnb = _library("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to("cpu")  # type: ignore[no-any-return]


Settings = Callable[[Any], dict[str, Any]]


def torchao(config: str, settings: Settings = lambda _: {}) -> Quantise:
    """Of a configuration's name, and what to give it, told by `torchao.quantization`."""

    def quantise(linear: nn.Linear) -> nn.Module:
        _library("torchao.quantization").quantize_(linear, torchao_config(config, settings))
        return linear

    return quantise


def torchao_config(config: str, settings: Settings) -> Any:
    """The configuration itself. Raises NotHereError where torchao is absent."""
    library = _library("torchao.quantization")
    return getattr(library, config)(**settings(library))


def hqq(linear: nn.Linear, bits: int = 4, axis: int = 1, **settings: Any) -> nn.Module:
    """HQQLinear with groups of 32."""
    library = _library("hqq.core.quantize")
    config = library.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis, **settings)
    return library.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")  # type: ignore[no-any-return]


DENSE, NF4, LLM_INT8 = "dense", "NF4", "LLM.int8"
TORCHAO: dict[str, tuple[str, Settings]] = {
    "torchao int8": ("Int8WeightOnlyConfig", lambda _: {}),
    "torchao float8": ("Float8WeightOnlyConfig", lambda _: {}),
    "torchao int4": ("IntxWeightOnlyConfig", lambda q: {"weight_dtype": torch.int4, "granularity": q.PerGroup(32)}),  # type: ignore[attr-defined]
}
BASES: dict[str, Quantise] = {
    DENSE: lambda linear: linear,
    NF4: lambda linear: nf4_linear(linear, linear.weight.dtype),
    LLM_INT8: llm_int8,
    **{name: torchao(*made) for name, made in TORCHAO.items()},
    "HQQ": hqq,
}
"""By the name that the report gives them, but for the first two: makes such a layer of one that it may change."""


def quantise(model: nn.Module, base: str, paths: Iterable[str]) -> nn.Module:
    """The model with the named linear layers over another base, marked as PEFT looks for it.

    Raises:
        NotHereError: the library is not installed, or does not import.
        KeyError: no such base.
    """
    for path in paths:
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path).requires_grad_(False)
        setattr(model.get_submodule(parent), name, BASES[base](linear))  # type: ignore[arg-type]
    model.is_loaded_in_4bit = base == NF4  # type: ignore[assignment]
    model.is_loaded_in_8bit = base == LLM_INT8  # type: ignore[assignment]
    return model


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise NotHereError(f"{name.partition('.')[0]} does not import: {error}") from error
