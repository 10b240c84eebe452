"""Must an operation of ours be one to torch, too? Where something keeps, replaces or records what operations return."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

_WATCHERS = (
    "FakeTensorMode",
    "FunctionalTensorMode",
    "ProxyTorchDispatchMode",
    "_CachedTorchDispatchMode",  # these two are selective checkpointing
    "_CachingTorchDispatchMode",
)


def as_op() -> bool:
    """True under torch.compile, under selective checkpointing and with fake tensors.

    Other dispatch modes, such as counters of operations and bytes, see what an eager call really does.
    """
    if torch.compiler.is_compiling():
        return True
    if not is_in_torch_dispatch_mode():
        return False
    return any(type(mode).__name__ in _WATCHERS for mode in _get_current_dispatch_mode_stack())
