"""Which values an adapter trains of tokens that a tokenizer was given later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.models.adapters import attach_adapter
from fastpeft.models.new_tokens import add_embeddings, trained_embeddings

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PIECES = {60: [5, 6], 61: [7, 8]}


def llama(tied: bool) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def trained(base: Any, task: str, whole: bool) -> int:
    """Numbers beside LoRA's."""
    add_embeddings(base, PIECES)
    ids = torch.tensor([[1, 5, 60]])
    before = base.eval()(input_ids=ids).logits
    model = attach_adapter(base, trained_embeddings(base, LoraSection(r=2), sorted(PIECES), whole), task, 0)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, before)
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)


@pytest.mark.parametrize("tied", [True, False])
def test_the_new_rows_alone_or_all(tied: bool) -> None:
    heads = 1 if tied else 2
    assert trained(llama(tied), "causal-lm", whole=False) == 2 * 32 * heads
    assert trained(llama(tied), "causal-lm", whole=True) == 62 * 32 * heads


def test_a_head_with_a_bias_keeps_it() -> None:
    base = BertForMaskedLM(BertConfig(**SIZES))
    torch.nn.init.normal_(base.get_output_embeddings().bias)
    assert trained(base, "masked-lm", whole=False) >= 62 * 32


def test_settings_that_would_lose_a_bias_are_refused() -> None:
    section = LoraSection(r=2, extra={"trainable_token_indices": {"word_embeddings": [1]}})
    with pytest.raises(UserError, match="expected none for a head with a bias, which PEFT would leave out"):
        attach_adapter(BertForMaskedLM(BertConfig(**SIZES)), section, "masked-lm", 0)
