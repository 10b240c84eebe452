"""Which bytes of tensors are alive while a model runs, with or without values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpeft_kernels.common.shapes import is_weightless, purpose_now

from .repeated import Repeated
from .values import met, moved_nowhere

_BLOCK = {"cuda": 512, "cpu": 1}
"""torch's allocator on a GPU hands out multiples of so many bytes."""
_ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
_MASK = torch.ops.aten.bernoulli_.float


def rounded(size: int, device: str) -> int:
    """Bytes that torch's allocator on "cuda" or "cpu" takes for so many."""
    block = _BLOCK[device]
    return -(-size // block) * block


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that makes them until nothing holds them.

    Of tensors without values, what a model asks about them is answered as for rows without padding: True, or 1.

    Args:
        device: "cuda" or "cpu", on which they are or would be.
        repeated: what is known of operations on tensors without values.
        some: of the tensors some have values, see `values`.

    Attributes:
        live: bytes that are alive now.
        peak: the most since `restart`.
        purposes: at that peak, bytes of what `empty_for` made, by purpose.
    """

    def __init__(self, device: str, repeated: Repeated | None = None, some: bool = False) -> None:
        super().__init__()
        self.device, self.live, self.peak, self.repeated, self.some = device, 0, 0, repeated, some
        self._known: dict[int, tuple[int, Any, str]] = {}
        self._purposes: Counter[str] = Counter()
        self.purposes: dict[str, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled within: torch need not see to that at each operation, which takes as long as the rest."""
        return False

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were made outside; returns their bytes, each storage once."""
        before = self.live
        for tensor in tensors:
            self._note(tensor)
        return self.live - before

    def restart(self) -> None:
        self._reached(self.live)

    def _reached(self, peak: int) -> None:
        self.peak, self.purposes = peak, {name: size for name, size in self._purposes.items() if size}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED and args[0].is_meta:
            return True if func is _ASKED[1] or args[0].dtype == torch.bool else 1
        kwargs = kwargs or {}
        if self.some:
            if (stays := moved_nowhere(func, args, kwargs)) is not None:
                if stays.get("dtype") in (None, args[0].dtype):
                    return args[0].detach()
                kwargs = stays
            args, kwargs = met(func, args, kwargs)
        result = func(*args, **kwargs) if self.repeated is None else self.repeated(func, args, kwargs)
        if func is _MASK and self.device == "cuda" and args[0].is_meta:
            self._shrink_mask(args[0])
        if not is_weightless():
            for tensor in (result,) if type(result) is Tensor else tree_leaves(result):
                if type(tensor) in (Tensor, Parameter):
                    self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, purpose = rounded(storage.nbytes(), self.device), purpose_now()
        self._known[key] = size, weakref.ref(storage, lambda _: self._forget(key)), purpose
        self.live += size
        if purpose:
            self._purposes[purpose] += size
        if self.live > self.peak:
            self._reached(self.live)

    def _shrink_mask(self, mask: Tensor) -> None:
        """Dropout's mask has the input's dtype on a CPU, on a GPU a byte an element."""
        key = mask.untyped_storage()._cdata
        size, ref, purpose = self._known[key]
        self._known[key] = rounded(mask.numel(), self.device), ref, purpose
        self.live += self._known[key][0] - size

    def _forget(self, key: int) -> None:
        size, _, purpose = self._known.pop(key)
        self.live -= size
        if purpose:
            self._purposes[purpose] -= size
