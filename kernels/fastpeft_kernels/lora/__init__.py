"""LoRA projections over frozen weights."""

from .api import lora_linear, lora_linear_group
from .embedding import lora_embedding
from .projection import Dtypes, LoraAdapter, LoraProjection
from .vera import vera_up

__all__ = ["Dtypes", "LoraAdapter", "LoraProjection", "lora_embedding", "lora_linear", "lora_linear_group", "vera_up"]
