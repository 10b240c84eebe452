"""The tiny models with bitsandbytes' 4-bit layers, packed on the CPU, and their fp64 truth."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel

from tests.integration.models import ARCHITECTURES, make_base, with_lora
from tests.integration.steps import Step, step

LEFT = ("lm_head", "classifier", "wo")  # heads, and what T5 keeps in fp32


def quantise(
    model: PreTrainedModel,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Every linear layer but the head becomes a Linear4bit, which bitsandbytes may not rearrange for CPU inference."""
    for path, linear in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if type(linear) is nn.Linear and name not in LEFT:
            setattr(model.get_submodule(parent), name, _packed(linear, quant_type, double_quant, compute_dtype))
    model.is_loaded_in_4bit = True
    model.quantization_method = "bitsandbytes"
    return model


def _packed(linear: nn.Linear, quant_type: str, double_quant: bool, compute_dtype: torch.dtype | None) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        quant_type=quant_type,
        compress_statistics=double_quant,
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=double_quant
    )
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def make_quantised(
    name: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    checkpointing: bool = False,
    prepared: bool = True,
    lora: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    **quantisation: Any,
) -> PeftModel:
    """QLoRA as PEFT's documentation does it: quantise, `prepare_model_for_kbit_training`, LoRA; in training mode."""
    base = quantise(make_base(name, dtype, **(sizes or {})), **quantisation)
    if prepared:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
    return with_lora(base, ARCHITECTURES[name].task, **(lora or {})).train()


def four_bit_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))


def forbid_packing(model: nn.Module) -> nn.Module:
    """For the plain PEFT model that ours is compared with."""
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False
    return model


def decoded(model: Any) -> Any:
    """A copy in fp64, with the dequantised values. `model` was not accelerated."""
    wide = copy.deepcopy(model)
    base = wide.get_base_model()
    base.is_loaded_in_4bit, base.quantization_method = False, None
    for path, layer in list(wide.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            state = layer.weight.quant_state
            state.dtype = torch.float32  # bitsandbytes decodes to the dtype of the product, from fp32
            dense = nn.Linear(state.shape[1], state.shape[0], bias=layer.bias is not None)
            dense.weight = nn.Parameter(bnb.functional.dequantize_4bit(layer.weight.data, state), requires_grad=False)
            dense.bias = layer.bias
            parent, _, name = path.rpartition(".")
            setattr(wide.get_submodule(parent), name, dense)
    return wide.double()


def quantised_truth(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """The step in fp64 with the dequantised values. `model` was not accelerated."""
    return step(decoded(model), inputs)
