"""Packed examples must not see each other; whether they do is tried out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpeft.errors import UserError
from fastpeft.models.devices import autocast

if TYPE_CHECKING:
    import torch

SLACK = {"float32": 1e-4, "bfloat16": 2e-3, "float16": 2e-3, "int8": 2e-2}
"""Of the logits' largest magnitude. Nearly all models that keep examples apart differ by nothing at all; but a mixture
of experts may round otherwise when other tokens are routed beside, and 8-bit layers look for outliers in all rows."""


def check_packing(model: Any, dtype: torch.dtype) -> None:
    """Compare a text's logits behind one text with those behind another.

    Attention that does not heed `position_ids` lets packed examples see each other, without a word; so do layers that
    carry a state along.

    Args:
        model: a decoder.
        dtype: what it computes in.

    Raises:
        UserError: they differ.
    """
    import torch

    device = model.device
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, model.config.get_text_config().vocab_size, (2, 8), generator=generator)
    second = torch.randint(0, model.config.get_text_config().vocab_size, (1, 8), generator=generator)
    positions = torch.arange(8, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            behind = [
                model(
                    input_ids=torch.cat((one[None], second), dim=1).to(device), position_ids=positions, use_cache=False
                ).logits[0, 8:]
                for one in first
            ]
    except TypeError:
        raise UserError(f"data.packing: {_name(model)} takes no position_ids; set it to false") from None
    finally:
        model.train(training)
    slack = SLACK["int8" if getattr(model, "is_loaded_in_8bit", False) else str(dtype).removeprefix("torch.")]
    if not (behind[0] - behind[1]).abs().max() <= slack * behind[0].abs().max():
        raise UserError(f"data.packing: packed examples would see each other in {_name(model)}; set it to false")


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
