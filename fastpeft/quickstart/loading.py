"""The base model, and the adapter on it: what a user's own script would say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastpeft.config import LoraSection, ModelSection
from fastpeft.models import adapters, bases
from fastpeft.models.tasks import resolve_task

from ..data.kinds import TEXT
from ..integrations import bitsandbytes
from .settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .packing import Blocks

TASK = "causal-lm"


@dataclass(frozen=True)
class Loaded:
    """What a task works with; the texts are packed."""

    device: torch.device
    dtype: torch.dtype
    model: Any
    blocks: Blocks
    held_out: Blocks


def load_tokenizer(settings: Settings) -> Any:
    """The model's tokenizer. Raises UserError where there is none."""
    return bases.load_tokenizer(ModelSection(name=settings.model), "--model")


def load_base(settings: Settings, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen base model, in evaluation mode.

    Raises:
        UserError: it cannot be loaded, is no decoder, or its positions do not reach --sequence-length.
    """
    model = ModelSection(name=settings.model)
    config = bases.load_config(model, "--model")
    resolve_task(TASK, TEXT, config, settings.model, "--model")
    bases.checked_length(settings.sequence_length, config, "--sequence-length")
    base, _ = bases.load_base(model, TASK, device, dtype, settings.quantization, key="--model")
    return base


def attach_adapter(base: Any, settings: Settings) -> Any:
    """A PEFT model with a fresh LoRA on every projection; the same for the same seed.

    Dropout is 0: PEFT and fastpeft draw it differently, and the two runs are to be compared step by step.
    """
    section = LoraSection(r=settings.rank, alpha=2 * settings.rank)
    return adapters.attach_adapter(base, section, TASK, settings.seed)


def forbid_cpu_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights for inference on CPUs with AVX512-BF16.

    It would do so in place, in the first forward in evaluation mode, to a form that its backward does not know:
    training afterwards loses the base's input gradients without a word. `fastpeft.accelerate` forbids it by itself;
    plain PEFT needs this to be evaluated before it is trained.
    """
    for module in model.modules():
        bitsandbytes.forbid_cpu_packing(module)
