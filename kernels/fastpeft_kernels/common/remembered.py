"""What is derived from the same tensors in every layer of a model, derived once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .tracing import as_op
from .within import within

Result = TypeVar("Result")
_ALL: weakref.WeakSet[Any] = weakref.WeakSet()
_forgetful: ContextVar[bool] = ContextVar("fastpeft_forgetful", default=False)


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    alive: tuple[weakref.ref[Any], ...]
    copies: tuple[Tensor, ...]
    result: Any

    def is_of(self, on_host: list[Tensor]) -> bool:
        """Whether the memory is still that, and what lies in the host's has the same values."""
        return all([each() is not None for each in self.alive]) and all(map(torch.equal, self.copies, on_host))


class Remembered(Generic[Result]):
    """A function of tensors and plain values that gives its last results again.

    For the very memory that they were made of, to which torch saw no write since, on the same stream. In the host's
    memory, into which numpy writes too, values are compared; on a GPU, which would have to be waited for, a write
    through `.data` or by a kernel of somebody's own is not seen. Tensors that have
    no version, such as those of inference mode, are never taken for the same, nor what is trained, and views of it:
    torch's fused optimizers write without a new version. Nor is anything while a CUDA graph is captured, which must
    hold what it reads, within `forgetful`, or where operations are recorded or transformed.

    Args:
        make: the function; whoever gets its result must not write into it.
        most: how many results are kept: a model's layers may take turns with so many masks.
    """

    def __init__(self, make: Callable[..., Result], most: int = 4) -> None:
        self.make, self.most = make, most
        self._entries: tuple[_Entry, ...] = ()
        _ALL.add(self)

    def forget(self) -> None:
        self._entries = ()

    def __call__(self, *args: Any) -> Result:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if (
            as_op()
            or _forgetful.get()
            or torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state() is not None
        ):
            return self.make(*args)
        if not tensors or any([type(t) is not Tensor or t.is_inference() or _is_trained(t) for t in tensors]):
            return self.make(*args)
        stream = None
        if tensors[0].is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return self.make(*args)
            stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
        key = (
            stream,
            torch.is_inference_mode_enabled(),
            *[_identity(arg) if isinstance(arg, Tensor) else arg for arg in args],
        )
        on_host = [t.detach() for t in tensors if t.device.type == "cpu"]
        for entry in self._entries:
            if entry.key == key and entry.is_of(on_host):
                found: Result = entry.result
                return found
        result = self.make(*args)
        alive = tuple([weakref.ref(t.untyped_storage()) for t in tensors])
        entry = _Entry(key, alive, tuple([t.clone() for t in on_host]), result)
        self._entries = (entry, *self._entries[: self.most - 1])
        return result


def forgetful() -> AbstractContextManager[None]:
    """Within it all is made anew and nothing kept: for operations of torch's, whose memory may be a CUDA graph's."""
    return within(_forgetful, True)


def forget_remembered() -> None:
    """Let go of all results, and of what they were made of."""
    for each in list(_ALL):
        each.forget()


def _is_trained(t: Tensor) -> bool:
    """Whether an optimizer may write into its memory."""
    whole = t if t._base is None else t._base
    return whole.is_leaf and whole.requires_grad


def _identity(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype, t._version
