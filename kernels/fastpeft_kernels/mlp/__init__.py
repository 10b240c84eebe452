"""A Transformer's MLP over frozen weights with LoRA, as one operation."""

from .api import lora_mlp
from .structure import Mlp

__all__ = ["Mlp", "lora_mlp"]
