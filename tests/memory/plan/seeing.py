"""Small models that see or hear, and one step of them, predicted and measured."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

import fastpeft
from fastpeft.bench.memory import peak_of_step
from fastpeft.config import LoraSection
from fastpeft.memory.plan.media import Pictures
from fastpeft.memory.plan.predicting import Model, Setting
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.models.adapters import attach_adapter
from fastpeft.models.tasks import auto_class, planned_task

WORDS = 2000
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = TEXT | {"model_type": "llama"}
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
TILES = VISION | {"image_size": 64, "patch_size": 8}
QWEN: dict[str, Any] = {
    "depth": 6, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256, "patch_size": 14,
}  # fmt: skip
HERE = {"image_token_id": WORDS - 1}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}


def _qwen(kind: Any, **vision: Any) -> Any:
    ids = {name: WORDS - 2 - n for n, name in enumerate(("video_token_id", "vision_start_token_id"))}
    return kind(text_config=TEXT | ROPE, vision_config=QWEN | vision, **HERE, **ids)


def _hears(name: str) -> Any:
    stacks = {
        f"{part}_{what}": number
        for part in ("encoder", "decoder")
        for what, number in (("layers", 6), ("ffn_dim", 512), ("attention_heads", 4))
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    both = {"vocab_size": WORDS, "d_model": 256, "max_target_positions": 200, **stacks, **ids}
    if name == "whisper":
        return hf.WhisperConfig(**both, num_mel_bins=16, max_source_positions=150)
    if name == "speech_to_text":
        return hf.Speech2TextConfig(**both, max_source_positions=400, input_feat_per_channel=16, conv_channels=128)
    kind = {"wav2vec2": hf.Wav2Vec2Config, "hubert": hf.HubertConfig}[name]
    return kind(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, conv_dim=[64] * 7,
        num_conv_pos_embedding_groups=4, mask_time_length=4, num_labels=5, layerdrop=0.0,
    )  # fmt: skip


def config(name: str) -> Any:
    """Of a model with six layers in each stack."""
    if name in ("whisper", "speech_to_text", "wav2vec2", "hubert"):
        return _hears(name)
    if name == "qwen2_5_vl":
        return _qwen(hf.Qwen2_5_VLConfig, fullatt_block_indexes=[2, 5], window_size=56)
    if name == "qwen2_vl":
        return _qwen(hf.Qwen2VLConfig, embed_dim=128, hidden_size=256, mlp_ratio=2)
    if name == "qwen3_vl":
        return _qwen(hf.Qwen3VLConfig, num_position_embeddings=64, deepstack_visual_indexes=[0, 2, 4])
    if name == "llava":
        clip = VISION | {"model_type": "clip_vision_model"}
        return hf.LlavaConfig(text_config=LLAMA, vision_config=clip, image_token_index=WORDS - 1)
    if name == "gemma3":
        text = TEXT | {"head_dim": 64, "sliding_window": 64}
        return hf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=16, image_token_index=1999)
    if name == "paligemma":
        text = TEXT | {"model_type": "gemma", "head_dim": 64}
        seen = VISION | {"model_type": "siglip_vision_model"}
        return hf.PaliGemmaConfig(
            text_config=text, vision_config=seen, image_token_index=WORDS - 1, projection_dim=256, hidden_size=256
        )
    if name in ("llava_next", "llava_onevision"):
        clip = VISION | {"model_type": "clip_vision_model" if name == "llava_next" else "siglip_vision_model"}
        kind = {"llava_next": hf.LlavaNextConfig, "llava_onevision": hf.LlavaOnevisionConfig}[name]
        cut = {"image_grid_pinpoints": [[112, 224], [224, 112], [224, 224]]}
        return kind(text_config=LLAMA, vision_config=clip, image_token_index=WORDS - 1, image_token_id=WORDS - 1, **cut)
    if name == "internvl":
        seen = VISION | {"image_size": [112, 112], "patch_size": [14, 14]}
        return hf.InternVLConfig(text_config=LLAMA, vision_config=seen, image_token_id=WORDS - 1, image_seq_length=16)
    if name == "mistral3":
        text, seen = LLAMA | {"model_type": "mistral", "head_dim": 64}, VISION | {"model_type": "pixtral"}
        ends = {"image_token_index": WORDS - 1, "vision_feature_layer": -1}
        return hf.Mistral3Config(text_config=text, vision_config=seen, spatial_merge_size=2, **ends)
    kind = {"smolvlm": hf.SmolVLMConfig, "idefics3": hf.Idefics3Config}[name]
    return kind(text_config=LLAMA, vision_config=TILES, scale_factor=4, **HERE)


def predicted(
    described: Any, pictures: Pictures | None, rows: int, tokens: int, whole: bool = False, seconds: float | None = None
) -> Model:
    section = LoraSection(r=8)
    return Model(
        Setting(
            described, planned_task(described, pictures is not None), tokens, rows, False, torch.float32, section,
            device="cpu", accumulated=False, pictures=pictures, seconds=seconds,
        ),
        whole,
    )  # fmt: skip


def measured(model: Any, given: dict[str, torch.Tensor], policy: LayerPolicy) -> int:
    """Bytes of one step at the most, beside the model."""
    model.config.use_cache = False
    fastpeft.accelerate(model, memory=policy)

    def step() -> None:
        model(**given).loss.backward()
        model.zero_grad(set_to_none=True)

    step()  # finds the siblings
    return peak_of_step(step, "cpu")


class Both:
    """A model with values and the prediction of the same."""

    def __init__(
        self, name: str, pictures: Pictures | None, rows: int, tokens: int, seconds: float | None = None
    ) -> None:
        described = config(name)
        self.rows, self.tokens = rows, tokens
        self.predicted = predicted(described, pictures, rows, tokens, seconds=seconds)
        task, section = self.predicted.setting.task, self.predicted.setting.section
        assert section is not None
        torch.manual_seed(0)
        base = auto_class(task).from_config(described, dtype=torch.float32)
        self.model = attach_adapter(base, section, task, 0).train()

    def ratio(self, policy: LayerPolicy) -> float:
        """Of the predicted peak to the measured."""
        layers = MemoryPolicy(policy).of(len(self.predicted.skeleton.order))
        told = self.predicted.peak(layers, self.rows, self.tokens).size
        batch = self.predicted.batches.of(self.rows, self.tokens, self.rows * self.predicted.batches.pictures)
        given = {name: valued(each) for name, each in batch.items()}
        return told / measured(self.model, given, policy)


def valued(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor
    return torch.rand(tensor.shape) if tensor.is_floating_point() else torch.randint(1, 5, tensor.shape)
