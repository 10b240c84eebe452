"""A model as a training would have it, for the commands that try out its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpeft.config import LoraSection

from . import tuned
from .adapters import attach_adapter

if TYPE_CHECKING:
    import torch


def load_trainable(
    source: tuned.Source,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    section: LoraSection,
    seed: int = 0,
) -> Any:
    """The accelerated model with its adapter trained: its own, or on a base a fresh one as `section` says.

    A head that the checkpoint has no values for is random. Raises UserError as `tuned.load` and `attach_adapter`.
    """
    import fastpeft

    loaded, _ = tuned.load_base(source, device, dtype, quantization)
    if source.adapter is None:
        return fastpeft.accelerate(attach_adapter(loaded, section, source.task, seed))
    loaded = tuned.attach(source, loaded)
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return fastpeft.accelerate(loaded)
