"""RMSNorm and LayerNorm over the last dimension. Does not import Triton."""

from .api import ROUNDINGS, layer_norm, rms_norm

__all__ = ["ROUNDINGS", "layer_norm", "rms_norm"]
