"""accelerate's hooks: a replaced `forward` on an instance that may or may not do something."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def is_idle_hook(module: nn.Module, device: torch.device) -> bool:
    """True when the instance's own `forward` only makes accelerate align devices that are aligned already.

    `from_pretrained` puts such a hook on every quantised layer of a model that sits on one device.
    """
    hooks = sys.modules.get("accelerate.hooks")
    hook: Any = module.__dict__.get("_hf_hook")
    old = module.__dict__.get("_old_forward")
    if hooks is None or type(hook) is not hooks.AlignDevicesHook or old is None or hook.offload or hook.no_grad:
        return False
    if getattr(old, "__func__", None) is not type(module).forward:
        return False
    return _device(hook.execution_device) in (None, device)


def forward_is_its_class_s(module: nn.Module) -> bool:
    """True when the instance's own `forward` is its class's: what accelerate leaves when it takes a hook off."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def has_hook_on_its_forward(module: nn.Module) -> bool:
    """True when the instance's own `forward` is that of an accelerate hook, which ends in its class's."""
    inner = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    return "_hf_hook" in module.__dict__ and inner is type(module).forward


def rebind_hooked_forward(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """After a class swap: an accelerate hook, or what one left, that called `old.forward` calls `new.forward`."""
    for name in ("_old_forward", "forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old.forward:
            module.__dict__[name] = new.forward.__get__(module)


def _device(execution_device: Any) -> torch.device | None:
    if execution_device is None:
        return None
    if isinstance(execution_device, int):
        return torch.device("cuda", execution_device)
    device = torch.device(execution_device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
