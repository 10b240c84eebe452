"""What a model that hears is given: sound without values, as its feature extractor makes it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import UserError

SECONDS = 30.0
"""Of each row, where nothing was said."""
SAMPLES, FRAMES = 16000, 100
"""A second: of the wave, and of its spectrum."""
MOST = 24 * 3600.0


def check_seconds(seconds: float | None) -> None:
    """Raises ValueError for what is no length of a recording."""
    if seconds is not None and (not isinstance(seconds, (int, float)) or not 0 < seconds <= MOST):
        raise ValueError(f"seconds: expected more than 0, and {MOST:g} at the most, got {seconds!r}")


def sound(model: Any, config: Any, rows: int, seconds: float | None) -> dict[str, Tensor]:
    """What the model is given of rows with so many seconds each.

    Raises:
        UserError: it takes another length, or sound in a form that is not known.
    """
    names, kind = inspect.signature(model.forward).parameters, type(model).__name__
    length = SECONDS if seconds is None else seconds
    if "input_features" in names and hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        always = 2 * config.max_source_positions / FRAMES
        if seconds not in (None, always):
            raise UserError(f"seconds: {kind} makes every recording {always:g} seconds long, got {seconds:g}")
        return {"input_features": _floats(rows, config.num_mel_bins, 2 * config.max_source_positions)}
    if "input_features" in names and hasattr(config, "input_feat_per_channel"):
        return {"input_features": _floats(rows, max(1, round(length * FRAMES)), config.input_feat_per_channel)}
    if "input_values" in names:
        return {"input_values": _floats(rows, max(1, round(length * SAMPLES)))}
    raise UserError(f"MODEL: {kind} takes sound in a form that no plan is made for")


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
