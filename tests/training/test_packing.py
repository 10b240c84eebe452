"""Packed examples do not see each other, and models in which they would are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from fastpeft.errors import UserError
from fastpeft.training.packing import check_packing

_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_TOKENS, **_SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT2 = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}

APART: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=16)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA, head_dim=16)),
    "sliding": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, sliding_window=4)),
    "experts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT2, rotary_dim=8)),
}
TOGETHER: dict[str, Callable[[], Any]] = {
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_TOKENS, hidden_size=64, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_TOKENS, **_SIZES, ffn_dim=128, word_embed_proj_dim=64)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2)),
    "lfm2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"])),
}
"""Attention without regard to positions, and layers that carry a state along."""

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", APART)
def test_models_that_keep_them_apart(name: str, dtype: torch.dtype) -> None:
    model = APART[name]().to(dtype).train()
    check_packing(model, dtype)
    assert model.training


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TOGETHER)
def test_models_that_do_not(name: str, dtype: torch.dtype) -> None:
    model = TOGETHER[name]().to(dtype)
    message = f"^data.packing: packed examples would see each other in {type(model).__name__}; set it to false$"
    with pytest.raises(UserError, match=message):
        check_packing(model, dtype)


def test_a_module_that_is_trained_whole_over_another_dtype() -> None:
    config = LoraConfig(target_modules="all-linear", modules_to_save=["down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(APART["llama"]().to(torch.bfloat16), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    check_packing(model, torch.bfloat16)


def test_a_model_that_takes_no_positions() -> None:
    class Strange(torch.nn.Module):
        config, device = hf.LlamaConfig(), torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> None: ...

    with pytest.raises(UserError, match=r"^data\.packing: Strange takes no position_ids; set it to false$"):
        check_packing(Strange(), torch.float32)
