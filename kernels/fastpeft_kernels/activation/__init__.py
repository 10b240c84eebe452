"""The elementwise middle of a Transformer's MLP, act(gate) * up. Does not import Triton."""

from .api import KINDS, gated_activation, gated_activation_backward

__all__ = ["KINDS", "gated_activation", "gated_activation_backward"]
