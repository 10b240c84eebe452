"""Tiny models of each architecture, with LoRA on them, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fastpeft.integrations.versions import told_by

VOCABULARY, HIDDEN = 96, 64
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
_TRANSLATOR = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}


@dataclass(frozen=True)
class Architecture:
    """How to build one, PEFT's name of its task, and which modules of one layer share their input."""

    make: Callable[..., PreTrainedModel]
    task: str
    siblings: tuple[str, ...]


_QKV, _GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"

ARCHITECTURES = {
    "llama": Architecture(lambda **k: LlamaForCausalLM(LlamaConfig(**_DECODER | k)), "CAUSAL_LM", (_QKV, _GATE_UP)),
    "qwen2": Architecture(lambda **k: Qwen2ForCausalLM(Qwen2Config(**_DECODER | k)), "CAUSAL_LM", (_QKV, _GATE_UP)),
    "qwen3": Architecture(lambda **k: Qwen3ForCausalLM(Qwen3Config(**_DECODER | k)), "CAUSAL_LM", (_QKV, _GATE_UP)),
    "gemma2": Architecture(
        lambda **k: Gemma2ForCausalLM(Gemma2Config(**_DECODER | {"attn_implementation": "eager"} | k)),
        "CAUSAL_LM",
        (_QKV, _GATE_UP),
    ),
    "phi3": Architecture(lambda **k: Phi3ForCausalLM(Phi3Config(**_DECODER | k)), "CAUSAL_LM", ()),
    "gpt2": Architecture(lambda **k: GPT2LMHeadModel(GPT2Config(**_GPT2 | k)), "CAUSAL_LM", ()),
    "bert": Architecture(
        lambda **k: BertForSequenceClassification(BertConfig(**_ENCODER | k)), "SEQ_CLS", ("query key value",)
    ),
    "roberta": Architecture(
        lambda **k: RobertaForSequenceClassification(RobertaConfig(**_ENCODER | k)), "SEQ_CLS", ("query key value",)
    ),
    "albert": Architecture(  # one layer's weights, called in the place of each
        lambda **k: AlbertForSequenceClassification(AlbertConfig(**_ENCODER | {"embedding_size": 32} | k)),
        "SEQ_CLS",
        ("query key value",),
    ),
    "t5": Architecture(
        lambda **k: T5ForConditionalGeneration(T5Config(**_T5 | k)), "SEQ_2_SEQ_LM", ("q k v", "k v", "wi_0 wi_1")
    ),
    "bart": Architecture(
        lambda **k: BartForConditionalGeneration(BartConfig(**_TRANSLATOR | k)), "SEQ_2_SEQ_LM", (_QKV, "k_proj v_proj")
    ),
    "marian": Architecture(
        lambda **k: MarianMTModel(MarianConfig(**_TRANSLATOR | k)), "SEQ_2_SEQ_LM", (_QKV, "k_proj v_proj")
    ),
}


def make_base(name: str = "llama", dtype: torch.dtype = torch.float32, **sizes: int) -> PreTrainedModel:
    """The bare model, random weights large enough that attention is not uniform, no dropout of its own."""
    model = ARCHITECTURES[name].make(**sizes).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):  # applied by F.dropout
            module.dropout = 0.0
    return model


def with_lora(base: nn.Module, task: str | None = "CAUSAL_LM", **config: Any) -> PeftModel:
    """LoRA on all linear layers, adapters as after some training: lora_B is not zero."""
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **config}
    try:
        return trained(get_peft_model(base, LoraConfig(task_type=task, **chosen)))
    except AttributeError as error:
        if reason := told_by(error):
            pytest.skip(reason)
        raise


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """`make_base` and `with_lora`, in training mode."""
    return with_lora(make_base(name, dtype), ARCHITECTURES[name].task, **config).train()


def trained(model: nn.Module) -> Any:
    """Random values in every lora_B (and its bias), as large as makes the adapters matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def batch(model: nn.Module, rows: int = 3, tokens: int = 10) -> dict[str, Tensor]:
    """Random token ids, one row padded, with labels."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    mask = torch.ones_like(ids)
    if rows > 1 and tokens > 2:
        mask[-1, tokens - tokens // 3 :] = 0
    if "SequenceClassification" in type(base).__name__:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 3, (rows,))}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> None:
    """transformers' own; skips the test where transformers refuses this PEFT: 5.24 asks for one not released yet."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    """With activation checkpointing, as its users switch it on."""
    model.enable_input_require_grads()  # type: ignore[operator]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
    return model
