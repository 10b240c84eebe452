"""LoRA projections over frozen weights."""

from .api import lora_linear, lora_linear_group
from .embedding import lora_embedding, mixed_lora_embedding
from .projection import Dtypes, LoraAdapter, LoraProjection
from .vera import vera_up

__all__ = [
    "Dtypes",
    "LoraAdapter",
    "LoraProjection",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "mixed_lora_embedding",
    "vera_up",
]
