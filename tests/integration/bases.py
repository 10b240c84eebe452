"""The tiny models over quantised layers of several libraries, and their fp64 truth."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import Tensor, nn
from transformers.integrations import finegrained_fp8 as library
from transformers.integrations.finegrained_fp8 import FP8Linear

from fastpeft.bench import bases
from fastpeft.bench.bases import Quantise
from fastpeft.bench.left_out import NotHereError
from tests.integration import packed_layers
from tests.integration.fp8_layers import fp8_linear
from tests.integration.models import ARCHITECTURES, make_base, trained
from tests.integration.steps import Step, step

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Of a Llama; PEFT's "all-linear" does not know the layers of every library."""


def torchao(config: str, settings: Callable[[Any], dict[str, Any]] = lambda _: {}) -> Quantise:
    """Of a configuration's name, and what to give it, told by `torchao.quantization`."""
    return skipping(bases.torchao(config, settings))


def skipping(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The test is skipped where the library is absent."""

    def quantise(linear: nn.Linear, *args: Any, **kwargs: Any) -> nn.Module:
        try:
            return make(linear, *args, **kwargs)
        except NotHereError as error:
            pytest.skip(str(error))

    return quantise


hqq = skipping(bases.hqq)

BASES: dict[str, Quantise] = {
    **{name: skipping(make) for name, make in bases.BASES.items() if name not in (bases.DENSE, bases.NF4)},
    "GPTQ": packed_layers.TorchLinear,
    "AWQ": packed_layers.AwqTorchLinear,
}
"""By the name that the report gives them: makes such a layer of an nn.Linear, which it may change."""

EVERY: dict[str, Quantise] = {
    **{name: bases.BASES[name] for name in (bases.DENSE, bases.NF4)},
    **BASES,
    "transformers FP8": fp8_linear,
}
"""With those that have tests of their own."""


def quantise(model: nn.Module, base: str) -> nn.Module:
    """Every projection."""
    for path, linear in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if type(linear) is nn.Linear and name in PROJECTIONS:
            linear.requires_grad_(False)
            setattr(model.get_submodule(parent), name, EVERY[base](linear))
    model.is_loaded_in_4bit = base == bases.NF4  # type: ignore[assignment]
    model.is_loaded_in_8bit = base == bases.LLM_INT8  # type: ignore[assignment]
    return model


def make(
    base: str,
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    sizes: Mapping[str, int] | None = None,
    **lora: Any,
) -> PeftModel:
    """LoRA over a quantised model, in training mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        model = quantise(make_base(name, dtype, **(sizes or {})), base)
        chosen = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **lora}
        config = known(LoraConfig(task_type=ARCHITECTURES[name].task, **chosen))
        return trained(get_peft_model(model, config)).train()  # type: ignore[no-any-return]


def known(config: LoraConfig) -> LoraConfig:
    """The same, told which layers of PEFT go over `packed_layers`; PEFT itself would look for them in gptqmodel."""
    config._register_custom_module(
        {packed_layers.TorchLinear: GPTQLoraLinear, packed_layers.AwqTorchLinear: AwqLoraLinear}
    )
    return config


def stand_for_gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of `packed_layers` are found where gptqmodel has its own."""
    for place in packed_layers.PLACES:
        monkeypatch.setitem(sys.modules, place, sys.modules[packed_layers.__name__])


def quantised_layers(model: nn.Module) -> Iterator[Any]:
    """All of them, adapted or not."""
    return (module for module in model.modules() if values(module) is not None)


def truth(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """The step in fp64 over the values that the library itself decodes. `model` was not accelerated."""
    return step(wide(model), inputs)


def wide(model: nn.Module) -> nn.Module:
    """A copy in fp64 over the values that the library itself decodes. `model` was not accelerated."""
    copied = copy.deepcopy(model)
    for path, layer in list(copied.named_modules(remove_duplicate=False)):  # GPTQ's and AWQ's have two names
        decoded = values(layer)
        if decoded is None:
            continue
        bias = getattr(layer, "bias", None)
        dense = nn.Linear(decoded.shape[1], decoded.shape[0], bias=False)
        dense.weight = nn.Parameter(decoded.float(), requires_grad=False)
        dense.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, dense)
    return copied.double()


def values(layer: Any) -> Tensor | None:
    """What the library itself decodes, (out_features, in_features), or None for a layer that is none of theirs."""
    weight = layer._parameters.get("weight")
    if type(weight).__name__ == "Int8Params":
        codes = layer.state.CB if weight.CB is None else weight.CB
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return codes.float() * scale.unsqueeze(1).mul(1.0 / 127.0)
    if type(weight).__name__ == "Params4bit":
        state = copy.deepcopy(weight.quant_state)
        state.dtype = torch.float32  # bitsandbytes decodes to the dtype of the product, from fp32
        return bnb.functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    if type(layer) is FP8Linear:
        scale = layer.weight_scale_inv
        return library._dequantize_fp8_weight(weight, scale, layer.block_size, torch.float32)  # type: ignore[no-any-return]
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    if type(layer).__name__ == "HQQLinear":
        return layer.dequantize()
    if isinstance(layer, (packed_layers.TorchLinear, packed_layers.AwqTorchLinear)):
        return layer.dequantize_weight().t()
    return None
