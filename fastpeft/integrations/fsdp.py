"""FSDP2 (`torch.distributed.fsdp.fully_shard`): a module that was sharded by itself, as it was before."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_MIXED_IN = "FSDPModule"


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with the module itself."""
    return any(kind.__name__ == _MIXED_IN for kind in type(module).__mro__)


def before_sharding(module: nn.Module) -> nn.Module | str:
    """The module without what `fully_shard` has put on it itself, to be read within its forward, not called.

    Its parameters are those of the module, which FSDP2 has gathered for the call.

    Returns:
        The module itself where nothing was put on it; a reason, where its weights are given up after its forward, so
        that nothing can be computed from them later.
    """
    kinds = type(module).__bases__
    if not (len(kinds) == 2 and kinds[0].__name__ == _MIXED_IN and hasattr(module, "_get_fsdp_state")):
        return module
    sharded: Any = module
    state = sharded._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    if any(group is not None and group._reshard_after_forward for group in groups):
        return "weights that FSDP2 shards again after this module's forward (reshard_after_forward=True)"
    kind: type[nn.Module] = kinds[1]
    whole: nn.Module = kind.__new__(kind)
    whole.__dict__.update(module.__dict__)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, name)
        whole.__dict__[name] = type(hooks)((key, hook) for key, hook in hooks.items() if _owner(hook) is not state)
    return whole


def announces_backward(hook: Any) -> bool:
    """Whether a hook on an output is FSDP2's own, which prepares a backward and leaves the gradient as it is."""
    states: Any = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    return states is not None and isinstance(_owner(hook), states.FSDPState)


def _owner(hook: Any) -> Any:
    while not hasattr(hook, "__self__") and hasattr(hook, "__wrapped__"):
        hook = hook.__wrapped__
    return getattr(hook, "__self__", None)
