"""How many bytes a forward pass keeps for backward, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Made(TorchDispatchMode):
    """Notes every storage that any operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def bytes_kept(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages made during `forward` that are alive at its end, without parameters and buffers.

    Args:
        model: whose parameters and buffers do not count.
        forward: returns the loss, which is kept alive while counting and may keep no other output alive. Gradients must
            be on.
    """
    own = _storages(model)
    made = _Made()
    with made:
        loss = forward()
    kept = sum(size for ref, size in made.storages.values() if not ref.expired() and ref.cdata not in own)
    del loss
    return kept


def bytes_saved(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """The same for a compiled forward, into which `bytes_kept` cannot look: bytes of what it saves for backward."""
    own = _storages(model)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = 0 if storage._cdata in own else storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(kept.values())


def _storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
