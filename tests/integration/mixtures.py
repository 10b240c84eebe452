"""Tiny models with mixtures of experts, LoRA on their stacked parameters and on attention, and their truth in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.integration.models import VOCABULARY, trained
from tests.integration.steps import Step, step

STACKS = ("gate_up_proj", "down_proj")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_PLAIN_POSITIONS = {"rope_type": "default", "rope_theta": 10000.0}

MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, intermediate_size=48, num_local_experts=4)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES, intermediate_size=48, moe_intermediate_size=24, num_experts=6, head_dim=16)
    ),
    "deepseek": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**_SIZES, **_DEEPSEEK)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**_SIZES, intermediate_size=24, num_local_experts=4, head_dim=16, rope_parameters=_PLAIN_POSITIONS)
    ),
}


def make(
    name: str = "mixtral",
    dtype: torch.dtype = torch.float32,
    stacks: Sequence[str] = STACKS,
    implementation: str | None = None,
    **config: Any,
) -> PeftModel:
    """In training mode, random values in all weights; o_proj and, by default, both stacks of experts have adapters."""
    base = MIXTURES[name]().to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 32**-0.5)
    if implementation is not None:
        base.set_experts_implementation(implementation)
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj"], **config}
    parameters = [f"experts.{stack}" for stack in stacks]
    return trained(get_peft_model(base, LoraConfig(target_parameters=parameters, **chosen))).train()  # type: ignore[no-any-return]


def truth(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """The step of plain PEFT in fp64, which torch's grouped product does not know. `model` was not accelerated."""
    wide: Any = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")
    return step(wide, inputs)


def experts(model: nn.Module) -> Any:
    """The outermost wrapper in the last layer."""
    return model.get_submodule("base_model.model.model.layers.1.mlp.experts")
