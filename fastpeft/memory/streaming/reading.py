"""What a streamed weight is to Python while its values are in host memory only: read as ever, by a copy.

Its memory on the device is freed then, and any operation would read a null pointer. So it has another class meanwhile,
put in by `hide` and taken out by `show`, and each operation of torch that is called from Python with such a tensor
gets a copy of the values for just that call. What only asks about the tensor (shape, dtype, device) copies nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...layers.kept import STOCK, Keeper, stock_type

HOME = "fastpeft_home"
"""Attribute of a streamed tensor: its `Stowed`."""
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "storage_offset",
    "untyped_storage", "get_device", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_shared",
    "_is_view", "__len__", "requires_grad_", "retain_grad", "register_hook", "register_post_accumulate_grad_hook",
)  # fmt: skip
_SAME = ("to", "cpu", "cuda", "contiguous", "float", "double", "half", "bfloat16")


@cache
def _about() -> frozenset[Any]:
    """Functions that read no values: of the tensor itself they are right without."""
    found = [getattr(Tensor, name) for name in _METHODS]
    found += [torch._has_compatible_shallow_copy_type, torch.is_floating_point, torch.is_complex, torch.numel]
    for name, member in vars(torch._C.TensorBase).items():
        if type(member).__name__ == "getset_descriptor" and name not in _VALUES:
            found += [member.__get__, member.__set__]
    return frozenset(found)


@cache
def _same() -> frozenset[Any]:
    """Functions that return the tensor itself where nothing is to be done."""
    return frozenset(getattr(Tensor, name) for name in _SAME)


@cache
def _itself() -> frozenset[Any]:
    """Functions that need the memory of the tensor itself, or give it another one."""
    return frozenset([getattr(Tensor.data, "__set__"), Tensor.data_ptr, Tensor.record_stream])  # noqa: B009


class Home(NamedTuple):
    """Where the values of a streamed tensor are: in host memory, of the same shape and dtype, and whose they are.

    The layer is not held: C++ that has the tensor would hold the layer for good, where the layer holds that C++.
    """

    host: Tensor
    keeper: ref[Keeper]

    def open(self, tensor: Tensor) -> None:
        """Have the tensor's own memory filled, by its layer or, where that is gone, for good."""
        keeper = self.keeper()
        if keeper is not None:
            keeper.open()
        else:
            show(tensor)
            tensor.data = self.host.to(tensor.device, copy=True)


class Hidden(Tensor):
    """Mixed in before the class of a streamed tensor, outside its layer's turn.

    An operation that writes into it writes to host memory. What would share memory with it, as `detach()` and `data`
    do, is a `Copied`.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _itself() and isinstance(args[0], Hidden) and (len(args) == 1 or args[0] is not args[1]):
            args[0].__dict__[HOME].open(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            if func in _about() or func in _itself():
                return func(*args, **(kwargs or {}))
            if func in _same():
                probe = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
                if func(probe, *args[1:], **(kwargs or {})) is probe:
                    return args[0]
        return _on_copies(func, args, kwargs or {})

    def set_(self, *args: Any, **kwargs: Any) -> Any:  # torch dispatches neither this one nor the next
        self.__dict__[HOME].open(self)
        return self.set_(*args, **kwargs)  # of its other class

    def as_subclass(self, cls: Any) -> Any:
        return self.clone().as_subclass(cls)

    def __copy__(self) -> Any:
        return copy.deepcopy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.deepcopy(self).__reduce_ex__(protocol)


class Copied(Tensor):
    """A copy of a streamed weight's values, or a view of one. To write into it is an error, since it would be lost."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, Hidden) for kind in types):
            return NotImplemented  # theirs does both
        if func in _about() or func in _itself():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _on_copies(func, args, kwargs or {})


def hide(tensor: Tensor, host: Tensor, keeper: Keeper) -> None:
    """Have it read from `host` from now on."""
    if not isinstance(tensor, Hidden):
        tensor.__dict__[HOME] = Home(host, ref(keeper))
        tensor.__class__ = _hidden(type(tensor))


def show(tensor: Tensor) -> None:
    """Have it read from its own memory from now on."""
    tensor.__class__ = stock_type(tensor)
    tensor.__dict__.pop(HOME, None)


@cache
def _hidden(kind: type[Tensor]) -> type[Tensor]:
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, STOCK: kind}
    return type(kind.__name__, (Hidden, kind), members)  # some code looks at the name


def _on_copies(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`func` of copies of all streamed tensors among its arguments."""
    read: list[tuple[Tensor, Tensor, int]] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Hidden):
            made = value.__dict__[HOME].host.to(value.device, copy=True)
        elif isinstance(value, Copied):
            made = value.as_subclass(Tensor)
        else:
            return value
        read.append((value, made, made._version))
        return made

    def back(value: Any) -> Any:
        if type(value) is not Tensor or value.layout is not torch.strided:
            return value
        for given, made, version in read:
            if value is made and made._version != version:
                return given
            if value.untyped_storage()._cdata == made.untyped_storage()._cdata:
                return value.as_subclass(Copied)
        return value

    with torch._C.DisableTorchFunctionSubclass():
        with torch.inference_mode(False):  # a copy that counts writes
            args, kwargs = tree_map(plain, (args, kwargs))
        result = Tensor.detach(*args) if func == _DATA else func(*args, **kwargs)
        for given, made, version in read:
            if made._version == version:
                continue
            if isinstance(given, Copied):
                raise RuntimeError(
                    "a copy of a streamed weight was written into, which changes nothing in the model; write into the "
                    "parameter itself under torch.no_grad(), or fastpeft.restore(model) first"
                )
            given.__dict__[HOME].host.copy_(made)
        return tree_map(back, result)
