"""Small checkpoints in several shards, and whether two models are the same, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = {**_SIZES, "vocab_size": 48, "max_position_embeddings": 32}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (AutoModelForCausalLM, lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA))),
    "tied": (AutoModelForCausalLM, lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True))),
    "bert": (AutoModelForMaskedLM, lambda: BertForMaskedLM(BertConfig(**_SIZES, vocab_size=48))),
    "t5": (
        AutoModelForSeq2SeqLM,
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=72, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
    ),
    "gpt2": (
        AutoModelForCausalLM,
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=64, n_layer=2, n_head=2)),
    ),
}


def checkpoint(folder: Path, name: str = "llama", shard: str = "60KB", dtype: torch.dtype = torch.float32) -> str:
    """A folder with shards of a model of MODELS."""
    path = folder / name
    MODELS[name][1]().to(dtype).save_pretrained(path, max_shard_size=shard)
    assert len(list(path.glob("*.safetensors"))) > 1
    return str(path)


def plain(name: str, path: str, quant_type: str, nested: bool, dtype: torch.dtype) -> Any:
    """What transformers loads."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
    )
    return MODELS[name][0].from_pretrained(path, dtype=dtype, device_map={"": "cpu"}, quantization_config=bits)


def check_same(model: Any, expected: Any) -> None:
    """Fails unless both hold the same bits, in modules of the same classes, with the same quantisation."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    quantised = 0
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert one.requires_grad == other.requires_grad, name
        assert _facts(one) == _facts(other), name
        quantised += hasattr(other, "quant_state")
    assert quantised > 3
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.is_loaded_in_4bit and model.hf_quantizer.pre_quantized == expected.hf_quantizer.pre_quantized
    assert model.training == expected.training and model.name_or_path == expected.name_or_path


def _facts(parameter: Any) -> dict[str, Any]:
    facts = {name: value for name, value in vars(parameter).items() if name not in ("module", "quant_state")}
    if (state := getattr(parameter, "quant_state", None)) is not None:
        assert parameter.module.quant_state is state
        numbers = {name: value for name, value in vars(state).items() if isinstance(value, (int, str, torch.dtype))}
        facts |= {f"state.{name}": value for name, value in numbers.items()}
        facts["shape"], facts["offset"] = state.shape, state.nested and (state.offset.dtype, state.offset.item())
    return facts
