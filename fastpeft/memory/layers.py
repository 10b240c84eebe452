"""Which modules of a model are its layers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def model_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that transformers' activation checkpointing wraps, by path, in the order of the modules.

    Empty where the model is none of transformers', or of a family that does without them.
    """
    home: Any = sys.modules.get("transformers.modeling_layers")
    if home is None:
        return {}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, home.GradientCheckpointingLayer) and not inside:
            found[path] = module
    return found
