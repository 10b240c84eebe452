"""transformers' families from tiny configurations: a new one is a line of `FAMILIES`.

Sizes go by the names that configurations give them, so that a line holds only what is special about a family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MIXTURE = "mixture"
HIDDEN, WORDS, TOKENS, ROWS = 64, 96, 12, 2
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 128),
    **dict.fromkeys(("n_inner", "hidden_dim", "ffn_hidden_size"), 128),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), WORDS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    # Every token goes to every expert: rounding must not choose another.
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "embedding_size", "q_lora_rank"), 32),
    "kv_lora_rank": 16,
    **dict.fromkeys(("state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank", "mamba_n_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("image_size", "num_mel_bins", "max_source_positions"), 16),
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One of transformers' families.

    Attributes:
        kind: "decoder", "mixture", "encoder", "encoder-decoder" or "picture, sound".
        model: class of the model.
        config: class of its configuration.
        overrides: of the sizes that all have; a name that the configuration has not by itself is taken too.
        left: names of linear layers that PEFT does not adapt.
    """

    kind: str
    model: str
    config: str
    overrides: dict[str, Any]
    left: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The bare model in fp32 with random weights that make attention uneven, no dropout, in training mode.

        Raises:
            Exception: whatever transformers says of the configuration.
        """
        import transformers

        torch.manual_seed(0)
        config = _tiny(getattr(transformers, self.config), self.overrides)
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
        return model.train()  # type: ignore[no-any-return]


def batch(model: Any) -> dict[str, Tensor]:
    """A small random batch with labels, pictures or sound where the model takes them."""
    from ...integrations.transformers import sample_batch

    config, generator = model.config, torch.Generator().manual_seed(1)
    if model.main_input_name == "input_features":
        sound = torch.randn(ROWS, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {"input_features": sound, "labels": torch.randint(3, WORDS, (ROWS, TOKENS), generator=generator)}
    seen = getattr(config, "vision_config", config)
    side = getattr(seen, "image_size", None)
    pictures = torch.randn(ROWS, 3, side, side, generator=generator) if side else None
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pictures, "labels": torch.randint(0, config.num_labels, (ROWS,), generator=generator)}  # type: ignore[dict-item]
    made = sample_batch(model, seed=1, rows=ROWS, tokens=TOKENS)
    if pictures is not None:
        patches = (side // seen.patch_size) ** 2
        made["input_ids"] = made["input_ids"].clamp(min=3)
        made["input_ids"][:, 1 : 1 + patches] = config.image_token_id
        made["pixel_values"] = pictures
    return made


def _tiny(kind: Any, overrides: dict[str, Any]) -> Any:
    names = kind().to_dict()
    chosen: dict[str, Any] = {name: value for name, value in _SIZES.items() if name in names}
    chosen |= {name: 0.0 for name, value in names.items() if _is_random(name, value)}
    return kind(**chosen | overrides)


def _is_random(name: str, value: Any) -> bool:
    return isinstance(value, float) and any(word in name for word in ("drop", "jitter"))


def _causal(name: str, kind: str = "decoder", left: tuple[str, ...] = (), **overrides: Any) -> Family:
    return Family(kind, f"{name}ForCausalLM", f"{name}Config", overrides, left)


def _encoder(name: str, **overrides: Any) -> Family:
    return Family("encoder", f"{name}ForSequenceClassification", f"{name}Config", {"num_labels": 3, **overrides})


def _pair(name: str, **overrides: Any) -> Family:
    return Family("encoder-decoder", f"{name}ForConditionalGeneration", f"{name}Config", overrides)


_T5 = {"decoder_start_token_id": 0}
_SMALL_PICTURE = {
    "model_type": "clip_vision_model",
    **{name: _SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
    **{name: _SIZES[name] for name in ("num_attention_heads", "image_size", "patch_size")},
}
_SMALL_TEXT = {
    "model_type": "llama",
    **{name: _SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")},
    **{name: _SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")},
}
_LINEAR_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
_GEMMA3N: dict[str, Any] = {
    "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS, "laurel_rank": 8, "altup_num_inputs": 2},
    "activation_sparsity_pattern": [0.5, 0.0],
}
_GEMMA4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": WORDS, "global_head_dim": 16},
}
_NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention"],
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1},
}
_ZAMBA2: dict[str, Any] = {
    **{"n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "adapter_rank": 4},
    **{"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4, "num_hidden_layers": 3},
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "hybrid_layer_ids": [1, 2],
}
_LLAMA4 = {"intermediate_size_mlp": 128, "attention_chunk_size": 8, "interleave_moe_layer_step": 2}
_NLLB_MOE = {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64, "forced_eos_token_id": None}
FAMILIES: dict[str, Family] = {
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral"),
    "qwen2": _causal("Qwen2"),
    "qwen3": _causal("Qwen3"),
    "gemma": _causal("Gemma"),
    "gemma2": _causal("Gemma2"),
    "gemma3": Family("decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", {}),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3"),
    "gpt2": Family("decoder", "GPT2LMHeadModel", "GPT2Config", {}),
    "gpt_neo": _causal("GPTNeo", attention_types=[[["global", "local"], 1]]),
    "gpt_neox": _causal("GPTNeoX"),
    "gptj": _causal("GPTJ"),
    "gpt_bigcode": _causal("GPTBigCode"),
    "codegen": _causal("CodeGen"),
    "opt": _causal("OPT", word_embed_proj_dim=HIDDEN),
    "bloom": _causal("Bloom"),
    "falcon": _causal("Falcon"),
    "mpt": _causal("Mpt"),
    "stablelm": _causal("StableLm"),
    "starcoder2": _causal("Starcoder2"),
    "cohere": _causal("Cohere"),
    "cohere2": _causal("Cohere2"),
    "olmo": _causal("Olmo"),
    "olmo2": _causal("Olmo2"),
    "olmo3": _causal("Olmo3"),
    "granite": _causal("Granite"),
    "glm": _causal("Glm"),
    "glm4": _causal("Glm4"),
    "nemotron": _causal("Nemotron"),
    "smollm3": _causal("SmolLM3"),
    "helium": _causal("Helium"),
    "seed_oss": _causal("SeedOss"),
    "ernie4_5": _causal("Ernie4_5"),
    "exaone4": _causal("Exaone4"),
    "arcee": _causal("Arcee"),
    "apertus": _causal("Apertus"),
    "persimmon": _causal("Persimmon"),
    "xglm": _causal("XGLM"),
    "biogpt": _causal("BioGpt"),
    "lfm2": _causal("Lfm2", layer_types=["full_attention", "conv"]),
    "qwen3_5": Family("decoder", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _LINEAR_FIRST),
    "gemma3n": Family("decoder", "Gemma3nForCausalLM", "Gemma3nTextConfig", _GEMMA3N),
    "gemma4": Family("decoder", "Gemma4ForCausalLM", "Gemma4TextConfig", _GEMMA4),
    "ministral3": _causal("Ministral3"),
    "bitnet": _causal("BitNet"),
    "rwkv": _causal("Rwkv", attention_hidden_size=HIDDEN),
    "falcon_h1": _causal("FalconH1", left=("out_proj",), mamba_d_ssm=128, mamba_d_head=16),
    "nemotron_h": _causal("NemotronH", left=("out_proj",), **_NEMOTRON_H),
    "zamba2": _causal("Zamba2", left=("out_proj",), **_ZAMBA2),
    "mamba": _causal("Mamba", left=("out_proj",)),
    "mamba2": _causal("Mamba2", left=("out_proj",), num_heads=8, n_groups=1),
    "bamba": _causal("Bamba", attn_layer_indices=[1]),
    "mixtral": _causal("Mixtral", MIXTURE),
    "qwen2_moe": _causal("Qwen2Moe", MIXTURE),
    "qwen3_moe": _causal("Qwen3Moe", MIXTURE),
    "qwen3_next": _causal("Qwen3Next", MIXTURE, layer_types=["linear_attention", "full_attention"]),
    "olmoe": _causal("Olmoe", MIXTURE),
    "deepseek_v2": _causal("DeepseekV2", MIXTURE, num_key_value_heads=4),
    "deepseek_v3": _causal("DeepseekV3", MIXTURE, head_dim=8, num_key_value_heads=4),
    "gpt_oss": _causal("GptOss", MIXTURE),
    "glm4_moe": _causal("Glm4Moe", MIXTURE),
    "granitemoe": _causal("GraniteMoe", MIXTURE),
    "qwen3_5_moe": Family(MIXTURE, "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", _LINEAR_FIRST),
    "llama4": Family(MIXTURE, "Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4, left=("router",)),
    "mistral4": _causal("Mistral4", MIXTURE, head_dim=8, num_key_value_heads=4, qk_head_dim=24),
    "minimax_m2": _causal("MiniMaxM2", MIXTURE),
    "lfm2_moe": _causal("Lfm2Moe", MIXTURE, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "granitemoehybrid": _causal(
        "GraniteMoeHybrid", MIXTURE, left=("out_proj",), mamba_d_head=16, **_LINEAR_FIRST, shared_intermediate_size=32
    ),
    "phimoe": _causal("Phimoe", MIXTURE, left=("router",)),
    "jamba": _causal("Jamba", MIXTURE, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "switch_transformers": Family(
        MIXTURE, "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", _T5
    ),
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "xlm-roberta": _encoder("XLMRoberta"),
    "distilbert": _encoder("DistilBert"),
    "albert": _encoder("Albert"),
    "electra": _encoder("Electra"),
    "deberta": _encoder("Deberta"),
    "deberta-v2": _encoder("DebertaV2"),
    "modernbert": _encoder("ModernBert"),
    "mpnet": _encoder("MPNet"),
    "roformer": _encoder("RoFormer"),
    "esm": _encoder("Esm", mask_token_id=3),
    "xlnet": _encoder("XLNet"),
    "funnel": _encoder("Funnel", block_sizes=[1, 1]),
    "convbert": _encoder("ConvBert"),
    "eurobert": _encoder("EuroBert"),
    "nomic_bert": _encoder("NomicBert"),
    "big_bird": _encoder("BigBird", attention_type="original_full"),
    "longformer": _encoder("Longformer", attention_window=8),
    "t5": _pair("T5", **_T5, feed_forward_proj="gated-gelu"),
    "mt5": _pair("MT5", **_T5),
    "umt5": _pair("UMT5", **_T5),
    "longt5": _pair("LongT5", **_T5),
    "bart": _pair("Bart", forced_eos_token_id=None),
    "mbart": _pair("MBart", forced_eos_token_id=None),
    "marian": Family("encoder-decoder", "MarianMTModel", "MarianConfig", {"forced_eos_token_id": None}),
    "pegasus": _pair("Pegasus", forced_eos_token_id=None),
    "blenderbot": _pair("Blenderbot", forced_eos_token_id=None),
    "m2m_100": _pair("M2M100"),
    "prophetnet": _pair("ProphetNet"),
    "led": _pair("LED", attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    "nllb-moe": Family(MIXTURE, "NllbMoeForConditionalGeneration", "NllbMoeConfig", _NLLB_MOE),
    "vit": Family("picture, sound", "ViTForImageClassification", "ViTConfig", {"num_labels": 3}),
    "whisper": Family(
        "picture, sound",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"max_target_positions": 64, "begin_suppress_tokens": None, "suppress_tokens": None},
    ),
    "llava": Family(
        "picture, sound",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {"vision_config": _SMALL_PICTURE, "text_config": _SMALL_TEXT, "image_token_index": 2, "image_seq_length": 4},
    ),
}
"""By transformers' name of the family (`model_type`)."""
