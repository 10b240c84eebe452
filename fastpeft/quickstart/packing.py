"""Text as blocks of equal length, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpeft.cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def packed_blocks(tokenizer: Any, path: str, length: int, option: str) -> list[dict[str, Tensor]]:
    """A text's tokens, cut into blocks; what is left over is dropped.

    Args:
        tokenizer: of the model.
        path: the text.
        length: tokens a block.
        option: the command's name for the text, for messages.

    Returns:
        Examples as transformers' Trainer takes them: input_ids and labels, int64, (length,) each.

    Raises:
        UserError: not even one block.
    """
    import torch

    text = Path(path).read_text(encoding="utf-8")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    if len(ids) < length:
        raise UserError(f"{option}: expected at least --sequence-length {length} tokens, got {len(ids)} in {path}")
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]
