"""PEFT's LoRA layers: what they hold, read at each call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from fastpeft_kernels.experts import ExpertAdapter
from fastpeft_kernels.lora import LoraAdapter

from ..layers.bypass import why_not_bypassed
from .dora import is_dora
from .tuner_layers import why_not_active, why_not_cast, why_not_plain
from .versions import require_core

_VARIANTS = "peft.tuners.lora.variants"


def used_adapters(layer: Any, device: torch.device, row_names: Sequence[str] | None) -> tuple[LoraAdapter, ...] | str:
    """The adapters of a LoRA layer that a call uses, as the ops take them, or why PEFT's own forward must run.

    Those that are absent from this layer are skipped, as PEFT does.

    Args:
        layer: of PEFT.
        device: of the input.
        row_names: each row's adapter in a mixed batch; None where all active ones serve every row.
    """
    reason = why_not_active(layer) or why_not_cast(layer)
    if reason is not None:
        return reason
    modules = layer._modules
    lora_a, lora_b, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    found = []
    for index, name in enumerate(layer.active_adapters if row_names is None else dict.fromkeys(row_names)):
        if name not in lora_a:
            continue
        variant = layer.lora_variant.get(name)
        if not (variant is None or is_plain(variant) or (row_names is None and is_dora(variant))):
            return f"adapter {name!r} is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
        a, b, dropout = lora_a[name], lora_b[name], dropouts[name]
        reason = why_not_bypassed(a, nn.Linear, device) or why_not_bypassed(b, nn.Linear, device)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
        p = 0.0
        if type(dropout) is not nn.Identity:
            reason = why_not_bypassed(dropout, nn.Dropout, device)
            if reason is not None:
                return f"adapter {name!r}: {reason}"
            p = dropout.p if dropout.training else 0.0
            if p >= 1.0:
                return f"adapter {name!r}: dropout of {p}"
        scaling = layer.scaling[name]
        if not _is_plain_factor(scaling, device):
            return f"adapter {name!r}: a scaling that is trained, no single number, or on another device"
        weight_a, weight_b, bias = a._parameters["weight"], b._parameters["weight"], b._parameters["bias"]
        for weight in (weight_a, weight_b, bias):
            reason = why_not_plain(weight, device)
            if reason is not None:
                return f"adapter {name!r}: {reason}"
        if weight_a.dtype != weight_b.dtype:
            return f"adapter {name!r}: lora_A in {weight_a.dtype}, lora_B in {weight_b.dtype}"
        rank = weight_a.shape[0]
        if weight_a.shape != (rank, layer.in_features) or weight_b.shape != (layer.out_features, rank):
            return f"adapter {name!r}: lora_A of {tuple(weight_a.shape)}, lora_B of {tuple(weight_b.shape)}"
        if bias is not None and row_names is not None:
            return f"adapter {name!r}: a bias (lora_bias) in a mixed batch"
        found.append(LoraAdapter(weight_a, weight_b, scaling, bias, p, index))
    return tuple(found)


def is_plain(variant: Any) -> bool:
    """Whether a LoRA variant computes what LoRA does: MiCA, which differs in what it trains."""
    kind = type(variant)
    return kind.__module__ == _VARIANTS and kind.__name__ in (
        "MiCALinearVariant",
        "MiCAEmbeddingVariant",
    )


_STATELESS = ("ALora", "BdLora", "Dora", "MiCA", "QALora")


def has_stateful_variant(module: nn.Module) -> bool:
    """Whether a LoRA layer within has a variant whose forward may leave something behind, in adapters or elsewhere.

    Arrow's first one subtracts from all adapters, MonteCLoRA draws numbers ahead, VeLoRA and KaSA set themselves up.
    """
    kinds = {type(v) for m in module.modules() for v in m.__dict__.get("lora_variant", {}).values()}
    return not all(k.__module__ == _VARIANTS and k.__name__.startswith(_STATELESS) for k in kinds)


def saved_copies(module: nn.Module) -> list[nn.Module]:
    """What PEFT calls in the place of a module that is trained and saved as a whole (`modules_to_save`): the original
    and each adapter's copy. Empty for any other module."""
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return []
    return [module.original_module, *module.modules_to_save.children()]


def hands_over_a_cache(model: nn.Module) -> str | None:
    """The method that reaches a model's layers by a key-value cache, such as "PREFIX_TUNING", or None."""
    for module in model.modules():
        configs = getattr(module, "peft_config", {}) if "prompt_encoder" in module._modules else {}
        for config in configs.values():
            if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
                return str(config.peft_type.value)
    return None


def base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all within it that is of the base: without adapters, and without copies that are saved with them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    yield module
    for name, child in module.named_children():
        if isinstance(module, BaseTunerLayer) and name != "base_layer":
            continue
        if isinstance(module, AuxiliaryTrainingWrapper) and name != "original_module":
            continue
        yield from base_modules(child)


def adapter_index(row_names: Sequence[str]) -> tuple[int, ...] | None:
    """The index of each row's adapter among `used_adapters`; None where it is the same for all."""
    return _index_of_rows(tuple(row_names))


@lru_cache(maxsize=64)
def _index_of_rows(row_names: tuple[str, ...]) -> tuple[int, ...] | None:
    order = {name: index for index, name in enumerate(dict.fromkeys(row_names))}
    return tuple([order[name] for name in row_names]) if len(order) > 1 else None


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within it each row of a batch has an adapter of its own, with gradients and in training mode, too.

    What PEFT's `model(..., adapter_names=[...])` does for inference. Backward of a model with activation checkpointing
    must run within it. Rows whose name a layer does not have, and rows named "__base__", get its base alone. For an
    adapter to be trained it must be among the active ones: `model.base_model.set_adapter([...])`.

    Args:
        model: holds LoRA layers.
        adapter_names: the adapter's name for each row of the batch, which is every layer's first dimension.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a name that no layer has. A layer raises one that is called with another number of rows.
    """
    require_core()
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names: expected the name of an adapter for each row, got {adapter_names!r}")
    names = list(adapter_names)
    layers = [
        module
        for module in _outside_adapters(model, LoraLayer)
        if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))
    ]
    adapted = [layer for layer in layers if isinstance(layer, LoraLayer)]
    unknown = {*names} - {"__base__"}
    for layer in adapted:
        if not unknown:
            break
        unknown.difference_update(layer.lora_A, layer.lora_embedding_A)
    if unknown:
        known = {name for layer in adapted for name in (*layer.lora_A, *layer.lora_embedding_A)}
        raise ValueError(f"adapter_names: expected any of {sorted(known)} and '__base__', got {sorted(unknown)}")

    hook = partial(_with_row_names, adapter_names=names)
    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _outside_adapters(model: nn.Module, adapted: type[Any]) -> list[nn.Module]:
    """The model's modules, in any order, but for what layers of class `adapted` hold beside their base: with several
    adapters that is most of them."""
    seen, left = dict[nn.Module, None](), [model]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen[module] = None
        inside = module._modules
        held = [inside["base_layer"]] if isinstance(module, adapted) and "base_layer" in inside else inside.values()
        left += [child for child in held if child is not None]
    return list(seen)


def _with_row_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def hooked_row_names(layer: nn.Module) -> list[str] | None:
    """Each row's adapter in a mixed batch, where the one hook before a layer's forward hands it these; else None."""
    hooks = layer._forward_pre_hooks
    hook = next(iter(hooks.values())) if len(hooks) == 1 else None
    if not isinstance(hook, partial):
        return None
    function: Any = hook.func
    of_peft = (function.__module__, function.__name__) == ("peft.tuners.lora.model", "_adapter_names_pre_forward_hook")
    return hook.keywords.get("adapter_names") if of_peft or function is _with_row_names else None


def embedding_adapters(
    layer: Any, row_names: Sequence[str] | None
) -> dict[int, tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]] | str:
    """(a, b, scaling) of a LoRA embedding's adapters that a call uses, under their numbers of `adapter_index`, or the
    reason why PEFT's own forward must run; `row_names` as of `used_adapters`."""
    reason = why_not_active(layer)
    if reason is not None:
        return reason
    base = layer.get_base_layer()
    if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return "an embedding with max_norm, scale_grad_by_freq or sparse gradients"
    device, embed_scale = base.weight.device, layer._get_embed_scale()
    found = {}
    for index, name in enumerate(layer.active_adapters if row_names is None else dict.fromkeys(row_names)):
        if name not in layer.lora_embedding_A:
            continue
        if name in layer.lora_variant and not is_plain(layer.lora_variant[name]):
            return f"adapter {name!r} is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
        if layer.input_fns.get(name) is not None or layer.output_fns.get(name) is not None:
            return f"adapter {name!r}: an embedding in parts on several devices"
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        reason = why_not_plain(a, device) or why_not_plain(b, device)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
        if a.dtype != b.dtype:
            return f"adapter {name!r}: lora_A in {a.dtype}, lora_B in {b.dtype}"
        scaling = layer.scaling[name] if embed_scale is None else layer.scaling[name] * embed_scale.reshape(())
        if not _is_plain_factor(scaling, device):
            return f"adapter {name!r}: a scaling that is trained, no single number, or on another device"
        found[index] = (a, b, scaling)
    return found


def by_expert(wrapper: Any, adapters: tuple[LoraAdapter, ...], transposed: bool) -> tuple[ExpertAdapter, ...]:
    """The adapters of a ParamWrapper over a stack of experts as the ops take them; views.

    PEFT keeps the rows of A expert by expert, and the columns of B rank by rank. A stack is (experts, in, out) to PEFT
    where its module says `is_transposed`; where x is multiplied otherwise, A holds the outputs and B the inputs.

    Args:
        adapters: of `used_adapters`.
        transposed: whether x is multiplied by the stored matrices, and not by their transposes.
    """
    experts = wrapper.num_experts
    found = []
    for adapter in adapters:
        a = adapter.a.view(experts, -1, adapter.a.shape[1])
        b = adapter.b.view(adapter.b.shape[0], -1, experts).permute(2, 0, 1)
        if wrapper._did_swap_in_out_features == transposed:
            a, b = b.mT, a.mT
        found.append(ExpertAdapter(a, b, adapter.scaling))
    return tuple(found)


def _is_plain_factor(scaling: float | torch.Tensor, device: torch.device) -> bool:
    """Whether an op may take it: a number, or a tensor of one that is not trained, on this device."""
    if not isinstance(scaling, torch.Tensor):
        return True
    return scaling.dim() == 0 and not scaling.requires_grad and scaling.device == device
