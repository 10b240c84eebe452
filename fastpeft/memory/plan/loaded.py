"""What is planned for a loaded model: its adapters, storage and dtypes, and its bytes counted on itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations import bitsandbytes, quantised
from ...integrations.models import model_within
from ...models.tasks import planned_task
from ..layers import model_layers
from ..streaming.host_store import is_mapped
from ..trace.skeleton import stored
from .adapter import section_of
from .given import Given
from .largest import check_tokens
from .media import Pictures
from .predicting import Model, Setting, is_streamed

BLOCK = 512
"""Bytes of which torch's allocator on a GPU hands out multiples."""


def model_of_loaded(
    model: nn.Module,
    seq: int,
    batch: int,
    optimizer: str,
    accumulation: int | None = None,
    pictures: Pictures | None = None,
    seconds: float | None = None,
    given: Given | None = None,
) -> tuple[str, Model]:
    """The name of a model with LoRA adapters, and what is traced for it, as `planning.model_of` of a configuration.

    Args:
        model: of transformers, with adapters of PEFT, or a module that holds one; its weights 32 or 16 bits, or
            bitsandbytes' 4.
        seq, batch, optimizer, accumulation: as of `plan`.
        pictures, seconds: of each row.
        given: what the model was called with, in place of these two.

    Raises:
        ValueError: another kind of model, of adapter or of storage, or adapters in several models.
        UserError: the adapter does not fit a model that is built from the configuration, or `seq` its positions.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = model_within(model, (BaseTunerLayer,), "layers with adapters", "pass one of its models")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    if not hasattr(base, "config") or len(adapters) != 1:
        raise ValueError(
            f"model: expected a model of transformers with one adapter, got {type(base).__name__} with {len(adapters)}"
        )
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    check_tokens(seq, config)
    names = [name for name, _ in base.named_modules()]
    task = planned_task(config, pictures is not None or given is not None)
    setting = Setting(
        config, task, seq, batch, _in_four_bits(base), _dtype(base),
        section_of(next(iter(adapters.values())), names), optimizer, accumulated=accumulation != 1,
        pictures=pictures, seconds=seconds, given=given,
    )  # fmt: skip
    found = Model(setting)
    layers = list(model_layers(model).values())
    if len(layers) != len(found.skeleton.order):
        expected = len(found.skeleton.order)
        raise ValueError(f"model: expected {expected} layers, as its configuration has, got {len(layers)}")
    found.bytes = _counted(stored(model))
    sizes = [_counted(each for each in stored(layer) if is_streamed(*each)) for layer in layers]
    found.streamed = tuple((size["packed"], size["dense"]) for size in sizes)
    in_files = [[each for each in stored(layer) if is_streamed(*each) and is_mapped(each[1])] for layer in layers]
    found.mapped = tuple(sum(_counted(each).values()) for each in in_files)
    return str(getattr(config, "_name_or_path", "") or config.model_type), found


def _in_four_bits(base: nn.Module) -> bool:
    found = False
    for module in base.modules():
        reader = quantised.reader(module) if "weight" in module._parameters else None
        if reader is not None and not bitsandbytes.is_linear_4bit(module):
            raise ValueError(f"model: expected weights in 32, 16 or 4 bits, got {reader.name(module)}")
        found = found or bitsandbytes.is_linear_4bit(module)
    return found


def _dtype(base: nn.Module) -> torch.dtype:
    """Of most of the frozen values that are not packed."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in base.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _counted(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Bytes by kind, each tensor once, wherever its values are at present."""
    sizes, seen = dict.fromkeys(("packed", "dense", "trained", "buffer"), 0), set()
    for kind, tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            sizes[kind] += -(-tensor.nbytes // BLOCK) * BLOCK
    return sizes
