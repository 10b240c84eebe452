"""More tiny models, with batches: windows, sinks, caps, sounds and pictures; what attention adds to `models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.integration.models import _DECODER, _ENCODER, _T5, _TRANSLATOR, ARCHITECTURES, VOCABULARY

_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_WINDOW = {"sliding_window": 4}
_PICTURE = {"image_size": 8, "patch_size": 2, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_EAGER = {"attn_implementation": "eager"}
_MODERN = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
_SOUND = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}


def _gpt_oss(**k: Any) -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**{**_DECODER, **_MIXTURE, **_WINDOW, **_EAGER}, **k))


MORE: dict[str, Callable[[], nn.Module]] = {
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER, **_WINDOW)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**{**_DECODER, **_WINDOW, **_EAGER}, attn_logit_softcapping=2.0)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_DECODER, **_WINDOW, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt_oss": _gpt_oss,
    "modernbert": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**{**_ENCODER, **_MODERN, "bos_token_id": 1, "eos_token_id": 2})
    ),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**_T5)),
    "switch": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(**_T5, num_experts=2, router_jitter_noise=0.0)
    ),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**_T5)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**{**_TRANSLATOR, **_SOUND, "bos_token_id": 1, "eos_token_id": 2})
    ),
    "pegasus_x": lambda: hf.PegasusXForConditionalGeneration(hf.PegasusXConfig(**_TRANSLATOR, block_size=4)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_PICTURE, intermediate_size=64, num_labels=3)),
}

NAMES = (*(name for name in ARCHITECTURES if name not in MORE), *MORE)


def make(name: str) -> Any:
    """A bare model in training mode, as `models.make_base` makes it: attention far from uniform, nothing dropped."""
    torch.manual_seed(0)
    model: Any = MORE[name]() if name in MORE else ARCHITECTURES[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            elif parameter.dim() == 1 and not parameter.any():
                parameter.normal_(std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for each in ("dropout", "attention_dropout", "dropout_p"):
            if isinstance(getattr(module, each, None), float):
                setattr(module, each, 0.0)
        if hasattr(module, "relative_attention_bias"):
            module.relative_attention_bias.weight.data.normal_(std=2.0)
    return model.train()


def inputs(model: nn.Module, padding: str = "right", tokens: int = 11) -> dict[str, Tensor]:
    """A batch of two rows, one of them padded where the model takes tokens, with labels."""
    kind = type(model).__name__
    generator = torch.Generator().manual_seed(1)
    if kind.startswith("ViT"):
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, VOCABULARY, (2, tokens), generator=generator)
    if kind.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 24, generator=generator), "labels": ids}
    mask = torch.ones_like(ids)
    if padding == "left" and "SequenceClassification" not in kind:  # those read the first token
        mask[1, :4] = 0
    elif padding != "none":
        mask[1, -4:] = 0
    if "SequenceClassification" in kind:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    labels = ids.masked_fill(mask == 0, -100)
    if padding == "left":
        labels[1, 4] = -100  # it is told from padding, whose queries may give anything
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if getattr(model.config, "is_encoder_decoder", False):
        given["labels"] = ids[:, :7].clone()
    return given
