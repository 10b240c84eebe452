"""Classes of ours before a model's own, whichever these are: made once each, found again, copied and pickled."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations.accelerate import rebind_hooked_forward

_MADE: dict[tuple[type[Any], type[nn.Module]], type[nn.Module]] = {}


def mixed(mixture: type[Any], stock: type[nn.Module]) -> type[nn.Module]:
    """`stock` with `mixture` before it."""
    if (mixture, stock) not in _MADE:
        members = {"__module__": mixture.__module__, "__doc__": stock.__doc__}
        name = stock.__name__ if getattr(mixture, "keeps_name", False) else f"Fast{stock.__name__}"
        _MADE[mixture, stock] = type(name, (mixture, stock), members)
    return _MADE[mixture, stock]


def stock_class(mixture: type[Any], fast: type[nn.Module]) -> type[nn.Module]:
    """The class that `mixed` was given, also where others stand before ours."""
    return next(stock for (ours, stock), made in _MADE.items() if ours is mixture and issubclass(fast, made))


def is_mixed(fast: type[nn.Module]) -> bool:
    """Whether `mixed` made this very class; FSDP2 puts one of its own before."""
    return fast in _MADE.values()


def unmixed(kind: type[Any]) -> Any:
    """The model's own class, whatever of ours stands before it."""
    return next((stock for (_, stock), made in _MADE.items() if issubclass(kind, made)), kind)


def swap_in(module: nn.Module, mixture: type[Any]) -> None:
    """`mixture` before the module's class, unless it is there already."""
    if not isinstance(module, mixture):
        stock = type(module)
        module.__class__ = fast = mixed(mixture, stock)
        rebind_hooked_forward(module, stock, fast)


def swap_out(module: nn.Module, mixture: type[Any]) -> None:
    """Undo it, if nothing stands before ours: FSDP2 puts a class there, and ours then has to do nothing more."""
    fast = type(module)
    if isinstance(module, mixture) and is_mixed(fast):
        module.__class__ = stock = stock_class(mixture, fast)  # type: ignore[assignment]
        rebind_hooked_forward(module, fast, stock)


def reduced(module: nn.Module, mixture: type[Any]) -> tuple[Any, ...]:
    """For `__reduce_ex__`: the class has no name to be found by."""
    return _blank, (mixture, stock_class(mixture, type(module))), module.__dict__


def _blank(mixture: type[Any], stock: type[nn.Module]) -> nn.Module:
    made = mixed(mixture, stock)
    return made.__new__(made)
