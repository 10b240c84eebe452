"""Tiny models with tokenizers, saved as the hub has them, in place of those that examples and notebooks name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fastpeft.data.chat import TEMPLATES
from tests.docs.snippets import SHIPPED_MODEL
from tests.fresh import ROOT

EXAMPLES = ROOT / "examples"
KINDS = ("decoder", "encoder", "encoder-decoder")


def build(kind: str, folder: Path) -> Path:
    """A model of one of KINDS in `folder`, with random weights; returns the folder."""
    {"decoder": _decoder, "encoder": _encoder, "encoder-decoder": _encoder_decoder}[kind](folder)
    return folder


def _decoder(folder: Path) -> None:
    """The shipped model's tokenizer with a chat template, and weights of as many layers, but narrow ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(SHIPPED_MODEL, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    shutil.copyfile(TEMPLATES["chatml"], folder / "chat_template.jinja")
    config = LlamaConfig.from_pretrained(SHIPPED_MODEL)
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def _encoder(folder: Path) -> None:
    from transformers import BertConfig, BertForPreTraining

    tokenizer = _tokenizer("[CLS] $A [SEP]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForPreTraining(config).save_pretrained(folder)  # with pooler and masked-language head, as BERT's on the hub
    tokenizer.save_pretrained(folder)


def _encoder_decoder(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = _tokenizer("$A </s>", eos_token="</s>")
    tokenizer.add_tokens([f"<extra_id_{number}>" for number in range(100)], special_tokens=True)  # as T5's has
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(pattern: str, **special: str) -> Any:
    """Byte pairs learned from the examples' own texts; `pattern` puts the special tokens around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "unk_token": "<unk>", **special}
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_texts(), trainer)
    around = [(token, raw.token_to_id(token)) for token in special.values() if token in pattern]
    raw.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=512, **special)


def _texts() -> list[str]:
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "texts.jsonl").read_text("utf-8").splitlines()]
    return [row["text"] for row in rows]
