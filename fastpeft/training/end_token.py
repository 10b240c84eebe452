"""Can the model learn to stop?"""

from __future__ import annotations

from typing import Any

SAME = 0.01
"""Rows of the head that differ by less, relative to their norm, are the same: no training told them apart."""
ROWS = 4096
"""Rows of the head that are compared at once."""


def why_it_cannot_stop(model: Any, tokenizer: Any) -> str | None:
    """A sentence if the head's row of the end-of-sequence token is that of other tokens too; else None.

    Checkpoints have rows that pretraining never touched. If the token that ends an answer is one of them, a frozen head
    gives it the same score as all the others, whatever an adapter learns.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    end = tokenizer.eos_token_id
    if weight is None or not weight.is_floating_point() or weight.requires_grad or end >= weight.shape[0]:
        return None
    row = weight[end].detach().float()
    parts = weight.detach().split(ROWS)  # a copy of the whole head might not fit
    same = sum(int(((part.float() - row).norm(dim=1) <= SAME * row.norm()).sum()) for part in parts) - 1
    if same < 1:
        return None
    return (
        f"the model cannot learn to stop: its end-of-sequence token {tokenizer.eos_token!r} was never trained, {same} "
        "other tokens have the same row in the head; name one that was by data.eos_token"
    )
