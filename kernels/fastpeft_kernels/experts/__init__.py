"""Mixtures of experts with LoRA: products grouped by expert, and a layer's experts as one op. No Triton."""

from .api import grouped_lora_linear, lora_experts
from .gating import CLAMPED_SWIGLU, GATINGS, Gating
from .structure import ExpertAdapter, ExpertProjection, Experts

__all__ = [
    "CLAMPED_SWIGLU",
    "GATINGS",
    "ExpertAdapter",
    "ExpertProjection",
    "Experts",
    "Gating",
    "grouped_lora_linear",
    "lora_experts",
]
