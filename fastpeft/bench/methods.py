"""PEFT's ways to adapt a model, each as it would be set up for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RANK = 16
Adapt = Callable[[nn.Module, list[str]], nn.Module]


@dataclass(frozen=True)
class Method:
    """One of PEFT's ways to adapt.

    Attributes:
        adapt: makes the PEFT model of a base and the names of its projections.
        family: of `steps`: what model it is for.
        row_names: the adapter of each row of the batch, where rows have one of their own.
    """

    adapt: Adapt
    family: str = "llama"
    row_names: tuple[str, ...] = ()


def lora(more_targets: tuple[str, ...] = (), names: tuple[str, ...] = ("default",), **options: Any) -> Adapt:
    """LoRA on all projections.

    Args:
        more_targets: what else is adapted, by name.
        names: of the adapters, all of them active.
        options: of PEFT's LoraConfig.
    """

    def adapt(base: nn.Module, targets: list[str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        chosen = {"r": RANK, "lora_alpha": 2 * RANK, "init_lora_weights": False, **options}
        config = LoraConfig(target_modules=[*targets, *more_targets], **chosen)
        model: Any = get_peft_model(base, config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        if len(names) > 1:
            model.base_model.set_adapter(list(names))
        if chosen["init_lora_weights"] is False:
            with torch.no_grad():  # updates as large as the weights would be no fine-tuning
                for path, parameter in model.named_parameters():
                    if "lora_B" in path or "lora_embedding_B" in path:
                        parameter.mul_(0.1)
        return model  # type: ignore[no-any-return]

    return adapt


def other(config_class: str, **options: Any) -> Adapt:
    """A method of PEFT beside LoRA, on all projections unless the options say which."""

    def adapt(base: nn.Module, targets: list[str]) -> nn.Module:
        import peft

        return peft.get_peft_model(base, getattr(peft, config_class)(**{"target_modules": targets, **options}))  # type: ignore[no-any-return, arg-type]

    return adapt


_FOUR = ("first", "second", "third", "fourth")
METHODS: dict[str, Method] = {
    "LoRA": Method(lora()),
    "LoRA, dropout 0.1": Method(lora(lora_dropout=0.1)),
    "rsLoRA": Method(lora(use_rslora=True)),
    "LoRA, `lora_bias`": Method(lora(lora_bias=True)),
    "LoRA, OLoRA's initialisation": Method(lora(init_lora_weights="olora")),
    "LoRA, PiSSA's initialisation": Method(lora(init_lora_weights="pissa")),
    "LoRA, two active adapters": Method(lora(names=_FOUR[:2])),
    "LoRA, an adapter for each of 4 rows": Method(lora(names=_FOUR), row_names=_FOUR),
    "LoRA, embeddings and head too": Method(lora(more_targets=("embed_tokens", "lm_head"))),
    "LoRA, some tokens too": Method(lora(trainable_token_indices=[1, 2, 3])),
    "LoRA, stacked experts too": Method(
        lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"]), family="moe"
    ),
    "DoRA": Method(lora(use_dora=True)),
    "MiCA": Method(lora(init_lora_weights="mica")),
    "LoHa": Method(other("LoHaConfig", r=RANK // 2)),
    "LoKr": Method(other("LoKrConfig", r=RANK // 2)),
    "AdaLoRA": Method(other("AdaLoraConfig", init_r=RANK, target_r=RANK // 2, total_step=1000)),
    "(IA)3": Method(
        other("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "VeRA": Method(other("VeraConfig", r=16 * RANK)),
    "LayerNorm tuning": Method(
        other("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm", "norm"])
    ),
    "OFT": Method(other("OFTConfig")),
    "BOFT": Method(other("BOFTConfig")),
    "HRA": Method(other("HRAConfig")),
    "FourierFT": Method(other("FourierFTConfig")),
    "RandLoRA": Method(other("RandLoraConfig")),
    "VB-LoRA": Method(other("VBLoRAConfig", vector_length=32)),
    "MiSS": Method(other("MissConfig", r=RANK)),
    "SHiRA": Method(other("ShiraConfig", r=RANK)),
    "C3A": Method(other("C3AConfig", block_size=32)),
    "RoAd": Method(other("RoadConfig")),
}
"""By name."""
