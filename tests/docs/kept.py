"""The formulas of docs/concepts/memory.md, held against what torch keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft
from fastpeft.bench.kept import bytes_kept

TOKENS, HEADS = 64, 4


def check(layer_bytes_a_token: Callable[[int, int, int, int, int], int]) -> None:
    """Fails unless the page's formula, those of plain PEFT and of checkpointing are right for a small decoder."""
    for hidden, mlp, size, r in ((128, 320, 32, 8), (192, 256, 64, 16)):
        q, kv = HEADS * size, 2 * size
        small = 4 * HEADS + 8  # attention's and the norms' sums, in fp32
        kept = kept_a_token(hidden, mlp, size, r)
        assert 0 <= kept - layer_bytes_a_token(hidden, mlp, q, kv, r) <= small, kept
        kept = kept_a_token(hidden, mlp, size, r, accelerated=False)
        assert 0 <= kept - (28 * hidden + 10 * mlp + 8 * q + 4 * kv + 28 * r) <= small, kept
    assert kept_a_token(128, 320, 32, 8, checkpointing=True) == 2 * 128


def kept_a_token(
    hidden: int, mlp: int, size: int, r: int, *, accelerated: bool = True, checkpointing: bool = False
) -> float:
    """Bytes that one more layer keeps for each token; bf16, adapters in fp32."""
    kept = []
    for layers in (1, 2):
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            head_dim=size,
        )
        adapter = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), adapter).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if accelerated:
            fastpeft.accelerate(model)
        ids = torch.zeros((1, TOKENS), dtype=torch.long)

        def forward(model: torch.nn.Module = model, ids: Tensor = ids) -> Tensor:
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss

        forward()  # finds the siblings
        kept.append(bytes_kept(model, forward))
    return (kept[1] - kept[0]) / TOKENS


def check_fused_head() -> None:
    """Fails unless what TRL's head and loss keep is the same for a vocabulary of 512 and of 4096."""
    from trl.trainer.utils import add_fused_lm_head

    kept = []
    for vocabulary in (512, 4096):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).to(torch.bfloat16)
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, adapter).train()
        ids = torch.zeros((1, TOKENS), dtype=torch.long)

        def forward(model: torch.nn.Module = model, ids: Tensor = ids) -> Tensor:
            loss: Tensor = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
            return loss

        kept.append(bytes_kept(model, forward))
    assert kept[0] == kept[1], kept
