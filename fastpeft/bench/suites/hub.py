"""A cache of the hub that holds tiny models with random weights, under the names that test suites ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

REVISION = "0" * 40
WORDS = 300
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")


COMMON = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
_INNER = {**_SIZES, "intermediate_size": 64}
_GROUPED = {**_INNER, "num_key_value_heads": 2}
_BY_LETTER = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_ROUTED = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_DISTANCES = {**_INNER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
_TWO_STACKS = {"d_model": 32, "max_position_embeddings": 512, "decoder_start_token_id": 2} | {
    f"{stack}_{size}": number
    for stack in ("encoder", "decoder")
    for size, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
_HF, _PEFT, _TRL = "hf-internal-testing/", "peft-internal-testing/", "trl-internal-testing/"
_OPT = ("OPTForCausalLM", "OPTConfig", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32})
_GPT2 = ("GPT2LMHeadModel", "GPT2Config", _BY_LETTER)
_LLAMA = ("LlamaForCausalLM", "LlamaConfig", _GROUPED)
_QWEN2 = ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED)
_BERT = ("BertModel", "BertConfig", _INNER)
_T5 = ("T5ForConditionalGeneration", "T5Config", {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
})  # fmt: skip

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    _PEFT + "tiny-random-OPTForCausalLM": _OPT,
    _PEFT + "opt-125m": _OPT,
    _PEFT + "tiny-random-GPT2LMHeadModel": _GPT2,
    _PEFT + "tiny-random-gpt2": _GPT2,
    _HF + "tiny-random-gpt2": _GPT2,
    _PEFT + "tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_BY_LETTER, "rotary_dim": 4}),
    _PEFT + "tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _INNER),
    _PEFT + "tiny-random-BloomForCausalLM": (
        "BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    _TRL + "tiny-random-LlamaForCausalLM": _LLAMA,
    _PEFT + "tiny-random-LlamaForCausalLM": _LLAMA,
    _HF + "tiny-random-LlamaForCausalLM": _LLAMA,
    _PEFT + "tiny-dummy-qwen2": _QWEN2,
    _TRL + "tiny-Qwen2ForCausalLM-2.5": _QWEN2,
    _TRL + "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    _TRL + "tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    _TRL + "tiny-GptOssForCausalLM": ("GptOssForCausalLM", "GptOssConfig", {**_ROUTED, "head_dim": 8}),
    _HF + "tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GROUPED, "head_dim": 8}),
    _HF + "tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    _HF + "Mixtral-tiny": ("MixtralForCausalLM", "MixtralConfig", _ROUTED),
    _PEFT + "tiny-random-BertModel": _BERT,
    _HF + "tiny-random-BertModel": _BERT,
    _PEFT + "tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", "BertConfig", _INNER),
    _PEFT + "tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _INNER),
    _PEFT + "tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification", "RobertaConfig", _INNER,
    ),
    _TRL + "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "LlamaConfig", _GROUPED),
    _PEFT + "tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DISTANCES),
    _PEFT + "tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _DISTANCES),
    _PEFT + "tiny-random-t5": _T5,
    _PEFT + "tiny-random-T5ForConditionalGeneration": _T5,
    _PEFT + "tiny-random-T5ForConditionalGeneration-calibrated": _T5,
    _PEFT + "tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "BartConfig", _TWO_STACKS),
}  # fmt: skip
"""Class and configuration of transformers, and its values, by the name on the hub."""


def make_hub(folder: Path, sources: str) -> None:
    """Fill `folder`, which HF_HUB_CACHE then names; what is there already stays.

    Args:
        folder: made where it is not there.
        sources: of the tests: a model whose name does not stand in them is not made.
    """
    import transformers

    for name, (architecture, configuration, values) in MODELS.items():
        if name not in sources:
            continue
        entry = folder / f"models--{name.replace('/', '--')}"
        snapshot = entry / "snapshots" / REVISION
        if (entry / "refs" / "main").is_file():
            continue
        torch.manual_seed(0)
        config = getattr(transformers, configuration)(**COMMON, **values)
        getattr(transformers, architecture)(config).save_pretrained(snapshot)
        _tokenizer().save_pretrained(snapshot)
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(REVISION)


def _tokenizer() -> Any:
    """Bytes in, bytes out: every text has tokens, and none needs the hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk, mask_token=mask,
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    )  # fmt: skip
