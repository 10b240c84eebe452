"""Text as blocks of equal length, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastpeft.errors import UserError

from .settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


Blocks: TypeAlias = "list[dict[str, Tensor]]"
"""Examples as transformers' Trainer takes them: input_ids and labels, int64, (length,) each."""


def both_texts(tokenizer: Any, settings: Settings) -> tuple[Blocks, Blocks]:
    """The text to train on and the held-out one, packed; raises as `packed_blocks` does."""
    length = settings.sequence_length
    train = packed_blocks(tokenizer, settings.text, length, "--text")
    return train, packed_blocks(tokenizer, settings.held_out, length, "--held-out")


def packed_blocks(tokenizer: Any, path: str, length: int, option: str) -> Blocks:
    """A text's tokens, cut into blocks; what is left over is dropped.

    Args:
        tokenizer: of the model.
        path: the text.
        length: tokens a block.
        option: the command's name for the text, for messages.

    Raises:
        UserError: not even one block.
    """
    text = Path(path).read_text(encoding="utf-8")
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    if len(ids) < length:
        raise UserError(f"{option}: expected at least --sequence-length {length} tokens, got {len(ids)} in {path}")
    import torch

    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]
