"""May a module's `forward` be passed over, its parameters read directly? Checked inside forward, at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..integrations.accelerate import forward_is_its_class_s, is_idle_hook

SHARDED_BY_DEEPSPEED = "a parameter sharded by DeepSpeed"

OWN_CLASS: dict[type[nn.Module], type[nn.Module]] = {}
"""Our classes for frozen siblings -> the classes that they stand for; `layers/frozen.py` enters them."""


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what `frozen.py` has mixed in: what its parameters mean."""
    return OWN_CLASS.get(type(module), type(module))


def why_not_bypassed(
    module: nn.Module, kind: type[nn.Module], device: torch.device, known_hooks: int = 0
) -> str | None:
    """The reason why calling `module` could do more than `kind.forward` with its own parameters, or None.

    Args:
        known_hooks: how many forward pre-hooks it has whose work the caller does.
    """
    if type(module) is not kind and own_class(module) is not kind:
        return f"{type(module).__name__} in place of {kind.__name__}"
    if _has_hooks(module, known_hooks):
        return SHARDED_BY_DEEPSPEED if _is_partitioned(module) else f"a hook on a bypassed {kind.__name__}"
    if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or is_idle_hook(module, device)):
        return f"a replaced forward on a bypassed {kind.__name__}"
    parameters = module._parameters
    if issubclass(kind, nn.Linear) and not ("weight" in parameters and "bias" in parameters):
        held = [name for name in ("weight", "bias") if name not in parameters]  # FSDP1 keeps views in plain attributes
        return f"{' and '.join(held)} of a {kind.__name__} held elsewhere"
    return None


def _is_partitioned(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds its parameters: they are empty until its hooks, which only a call runs, gather them."""
    return any(hasattr(parameter, "ds_id") for parameter in module._parameters.values())


def is_bare(module: Any, kind: type[nn.Module]) -> bool:
    """Whether nothing is about a module that `why_not_bypassed` would have to look into."""
    return type(module) is kind and not (
        _has_hooks(module) or "forward" in module.__dict__ or (kind is nn.Linear and "weight" not in module._parameters)
    )


def _has_hooks(module: nn.Module, known: int = 0) -> bool:
    before = module._forward_pre_hooks
    return bool(len(before) > known or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def why_not_called(layer: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The reason, in the call or the process, why PEFT's own forward must run; or None."""
    if (args or kwargs) and (reason := _why_not_with(args, kwargs)) is not None:
        return reason
    if type(x) not in (Tensor, nn.Parameter):
        return f"an input of type {type(x).__name__}"
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"an input of {x.dim()} dimensions and dtype {x.dtype}"
    return _why_not_in(layer)


def why_not_embedded(layer: nn.Module, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The same for an embedding of token ids."""
    if (args or kwargs) and (reason := _why_not_with(args, kwargs)) is not None:
        return reason
    if type(ids) is not Tensor or ids.dtype not in (torch.int64, torch.int32):
        return f"an input of type {type(ids).__name__} and dtype {getattr(ids, 'dtype', None)}"
    return _why_not_in(layer)


def _why_not_with(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    named = sorted(name for name, value in kwargs.items() if value is not None)
    return f"called with {', '.join(named) or 'more arguments'}" if args or named else None


def _why_not_in(layer: nn.Module) -> str | None:
    if layer.__dict__.get("_is_replica"):
        return "a replica of nn.DataParallel"
    return "a global module hook" if has_global_hooks() else transformed()


def transformed() -> str | None:
    """What torch makes of a call's operations at present that no op of ours takes part in, or None."""
    if torch._C._get_tracing_state() is not None:  # it cannot see what our C++ writes
        return "torch.jit tracing"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return None


def has_global_hooks() -> bool:
    """Whether every module's call does more than its forward."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
