"""Tiny models and tokenizers on disk, as `from_pretrained` finds them: random weights, real formats."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import fastpeft

SHIPPED = str(Path(fastpeft.__file__).parent / "quickstart" / "assets" / "model")
_PUNCTUATION = ".,!?:;'\"()-+=<>|#/"


class Checkpoints:
    """Folders by name, each written when it is first asked for: `checkpoints["bert"]`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> str:
        folder = self._folder / name
        if not folder.exists():
            torch.manual_seed(0)
            model, tokenizer = MODELS[name]()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)


def write_rows(path: Path | str, *rows: dict[str, Any]) -> str:
    """JSON lines; returns the path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def wordpieces() -> PreTrainedTokenizerFast:
    """As BERT's: every word of ASCII letters and digits is spelled out."""
    signs = string.ascii_lowercase + string.digits
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs), *_PUNCTUATION]
    vocabulary = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **special)


def characters(*, trim_offsets: bool = False, ends: bool = False, begins: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, and runs of spaces, newlines and "ing" in one token.

    Args:
        trim_offsets: leave spaces out of the tokens' offsets, as GPT-NeoX's tokenizer does.
        ends: put the end-of-sequence token behind every text, as T5's does.
        begins: put the beginning-of-sequence token before every text, as Llama's does.
    """
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ċ", "Ċ"), ("i", "n"), ("in", "g"), ("Ġ", "a")]
    words = ["<pad>", "</s>", "<s>", "<unk>", *signs, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = ByteLevel()
    if ends:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    elif begins:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    elif trim_offsets:
        inner.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def _llama() -> tuple[Any, Any]:
    """The shipped model's tokenizer over two small layers."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=128)), tokenizer


def _bert(kind: Callable[[BertConfig], Any] = BertForMaskedLM) -> tuple[Any, Any]:
    tokenizer = wordpieces()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)), tokenizer


def _t5(tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[Any, Any]:
    tokenizer = tokenizer or characters(ends=True)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), **sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return T5ForConditionalGeneration(config), tokenizer


T5_SENTINELS = tuple(f"<extra_id_{number}>" for number in range(20))


def with_sentinels(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same one, with what T5 puts in the place of spans."""
    tokenizer.add_tokens(list(T5_SENTINELS), special_tokens=True)
    return tokenizer


def _t5_for_spans() -> tuple[Any, Any]:
    return _t5(with_sentinels(characters(ends=True)))


def _marian() -> tuple[Any, Any]:
    tokenizer = characters(ends=True)
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
    return MarianMTModel(MarianConfig(vocab_size=len(tokenizer), **sizes, **widths, **tokens)), tokenizer


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": _llama,
    "bert": _bert,
    "bert-without-head": lambda: _bert(BertModel),
    "bert-classifier": lambda: _bert(BertForSequenceClassification),
    "t5": _t5,
    "t5-for-spans": _t5_for_spans,
    "marian": _marian,
}
