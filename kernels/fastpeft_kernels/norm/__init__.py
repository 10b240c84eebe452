"""RMSNorm, with or without a gate, and LayerNorm over the last dimension. Does not import Triton."""

from .api import ROUNDINGS, layer_norm, rms_norm
from .gated import gated_rms_norm

__all__ = ["ROUNDINGS", "gated_rms_norm", "layer_norm", "rms_norm"]
