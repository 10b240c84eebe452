"""Embeddings of tokens that a tokenizer was given after its model was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpeft.config import LoraSection
from fastpeft.errors import UserError


def add_embeddings(base: Any, pieces: dict[int, list[int]]) -> None:
    """Rows for new tokens, in the head too: the mean of those of the pieces that each stands for; a head's bias is 0.

    Args:
        base: of transformers; its rows beyond those of the old tokenizer are overwritten.
        pieces: of each new token's ID.
    """
    import torch

    size = max(pieces) + 1
    if base.get_input_embeddings().weight.shape[0] < size:
        base.resize_token_embeddings(size, mean_resizing=False)
    head = base.get_output_embeddings()
    inputs = base.get_input_embeddings().weight
    weights = [inputs] + ([head.weight] if head is not None and head.weight is not inputs else [])
    with torch.no_grad():
        for values in weights:
            for token, old in pieces.items():
                values[token] = values[old].float().mean(0).to(values.dtype)


def make_room(base: Any, size: Callable[[], int], folder: Path) -> None:
    """Rows for all of the adapter's tokens, where it brings values for so many and the base has fewer.

    Args:
        size: how many these are; called only where the adapter brings more rows than the base has.
        folder: of the adapter.
    """
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    rows = base.get_input_embeddings().weight.shape[0]
    with safe_open(file, "pt") as weights:
        names = [name for name in weights.keys() if "lora_" not in name]  # noqa: SIM118
        brought = {shape[0] for name in names if (shape := weights.get_slice(name).get_shape()) and shape[0] > rows}
    if brought and (tokens := size()) in brought:
        base.resize_token_embeddings(tokens, mean_resizing=False)


def trained_embeddings(base: Any, section: LoraSection, new: list[int], whole: bool) -> LoraSection:
    """Settings with which an adapter trains new tokens' embeddings, and saves them as PEFT alone loads them.

    Args:
        base: with rows for them.
        section: the adapter's settings without.
        new: IDs of the new tokens.
        whole: train embeddings and head whole; else the new rows alone, but for a head with a bias, which PEFT's layer
            for single rows would leave out.

    Raises:
        UserError: the settings ask for something else of the embeddings already.
    """
    inputs, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in base.named_modules()}
    if "trainable_token_indices" in section.extra or names[inputs] in section.target_modules:
        raise UserError(
            f"strategy.options.new_tokens: expected no other training of {names[inputs]}, got it in lora's settings"
        )
    tied = head.weight is inputs.weight
    added = [names[inputs]] if tied else [names[inputs], names[head]]
    if not whole and getattr(head, "bias", None) is None:
        return replace(section, extra=section.extra | {"trainable_token_indices": dict.fromkeys(added, new)})
    extra = section.extra | ({"ensure_weight_tying": True} if tied else {})
    return replace(section, modules_to_save=list(dict.fromkeys([*section.modules_to_save, *added])), extra=extra)
