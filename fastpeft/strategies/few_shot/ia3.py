"""(IA)³: vectors that scale keys, values and feed-forward activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import Any

from fastpeft.config import LoraSection
from fastpeft.errors import UserError
from fastpeft.models.tasks import PEFT_TASKS


def attach_ia3(base: Any, section: LoraSection, task: str, seed: int) -> Any:
    """PEFT's, at the modules that it knows for the family of the model; as `attach_adapter`."""
    import peft
    import torch

    torch.manual_seed(seed)
    try:
        config = peft.IA3Config(task_type=PEFT_TASKS.get(task), modules_to_save=list(section.modules_to_save) or None)
        return peft.get_peft_model(base, config)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"strategy.options.adapter: ia3: {error}") from error
