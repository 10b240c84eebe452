"""Packed examples must not see each other; whether they do is tried out."""

from __future__ import annotations

from typing import Any

from fastpeft.errors import UserError

SLACK = 1e-2
"""Of the logits' largest magnitude: more than rounding in 16 bits, far less than another text in view."""


def check_packing(model: Any) -> None:
    """Compare a text's logits behind another one with those of the text alone.

    Attention that does not heed `position_ids` lets packed examples see each other, without a word.

    Raises:
        UserError: it does.
    """
    import torch

    device = model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, 16), generator=generator).to(device)
    positions = torch.arange(8, device=device).repeat(2)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:]
            alone = model(input_ids=ids[:, 8:], position_ids=positions[:, 8:], use_cache=False).logits
    except TypeError:
        raise UserError(f"data.packing: {type(model).__name__} takes no position_ids; set it to false") from None
    finally:
        model.train(training)
    if not (packed - alone).abs().max() <= SLACK * alone.abs().max():
        name = type(model).__name__
        raise UserError(f"data.packing: packed examples would see each other in {name}; set it to false")
