"""Gated activations in plain PyTorch: the definition, differentiable, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}


def gated_activation_reference(gate: Tensor | None, up: Tensor, kind: str) -> Tensor:
    """act(gate) * up, or act(up) where there is no gate; floating tensors of one shape, computed in their dtype."""
    activation = ACTIVATIONS[kind]
    return activation(up) if gate is None else activation(gate) * up
