"""What hidden lines of the pages take as given: a small model, a batch, files to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .snippets import SHIPPED_MODEL

PREFERENCES = {"prompt": "What is a list?", "chosen": " A mutable sequence.", "rejected": " A kind of dictionary."}


def __getattr__(name: str) -> Any:
    """Made anew for each page: `base_model`, `tokenizer`, and `model` with an adapter."""
    if name == "base_model":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL)
    if name == "tokenizer":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    if name == "model":
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(__getattr__("base_model"), adapter)
    raise AttributeError(name)


def batch(rows: int = 2, tokens: int = 16) -> dict[str, torch.Tensor]:
    """Token ids with labels."""
    ids = torch.randint(3, 3000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def rows(count: int = 4, tokens: int = 16) -> list[dict[str, torch.Tensor]]:
    """A dataset of `batch`'s rows, for Trainer."""
    whole = batch(count, tokens)
    return [{name: value[i] for name, value in whole.items()} for i in range(count)]


def write_json_lines(path: str, *records: dict[str, Any]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))
