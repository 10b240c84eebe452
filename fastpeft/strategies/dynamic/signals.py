"""What rules look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

LayerSignal = Literal["gradient_norm", "importance"]
"""Of each trained layer, at each step, after gradients were clipped."""
RunSignal = Literal["validation", "loss"]
"""Of the run: the loss of rows held back, at each evaluation; the loss of the training rows, at each step."""
SMOOTHING = 0.9
"""Share of the past in a smoothed signal."""


def gradient_norm(parameters: Sequence[Any]) -> Any:
    """Euclidean norm of all gradients; 0-d."""
    import torch

    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def importance(parameters: Sequence[Any]) -> Any:
    """Sum of |value times gradient|: to first order, what setting values to zero would change of the loss; 0-d.

    Source: Sensitivity in AdaLoRA, Zhang et al. 2023, arXiv:2303.10512, equation 8.
    """
    import torch

    return torch.stack([(parameter.detach() * parameter.grad).abs().sum() for parameter in parameters]).sum()


LAYER_SIGNALS: dict[str, Callable[[Sequence[Any]], Any]] = {"gradient_norm": gradient_norm, "importance": importance}


def of_layers(layers: Mapping[int, Sequence[Any]], signal: LayerSignal) -> dict[int, float]:
    """The signal of each layer; those are left out whose gradients overflowed, as the first of fp16 do."""
    import torch

    if not layers:
        return {}
    values = torch.stack([LAYER_SIGNALS[signal](parameters) for parameters in layers.values()]).tolist()
    return {number: value for number, value in zip(layers, values, strict=True) if math.isfinite(value)}


def smoothed(before: float | None, now: float) -> float:
    """The exponential moving average with one value more."""
    return now if before is None else SMOOTHING * before + (1 - SMOOTHING) * now
