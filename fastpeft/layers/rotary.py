"""Attention of any model with queries and keys turned in one pass: the model's own forward, in which a name is ours.

Every module of a file calls the one function that its file names, so nothing can be put in its place for one instance.
Here the instance's forward runs with globals of its own: a mapping that holds such names, and asks the file for all
others whenever they are looked up. The file, its other classes and instances are untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.rope.api import kernel_serves, run_rotary

from .bypass import transformed
from .mixing import reduced, swap_out, unmixed
from .rotary_calls import Turned
from .rotary_structure import Turn, holds

NO_KERNEL = "no kernel for this device and dtype"


class FastRotary(nn.Module):
    """Mixed in before a model's own class; overrides `forward`. Under torch.compile it is the model's own again."""

    fastpeft_turn: Mapping[str, Turn | None] | None = None  # by the function's name; None for one that is not known
    fastpeft_turns: dict[str, int]  # calls by outcome; attention counts its own
    fastpeft_suspended: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.fastpeft_turn is None or self.fastpeft_suspended or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        x = args[0] if args else kwargs.get("hidden_states")
        if type(x) is Tensor and x.is_cpu and not kernel_serves(x, x):  # names are looked up faster there
            self._count(NO_KERNEL)
            return super().forward(*args, **kwargs)
        ours = {
            name: partial(self._turned, name, turn) for name, turn in self.fastpeft_turn.items() if turn is not None
        }
        return _with_ours(unmixed(type(self)).forward, ours)(self, *args, **kwargs)

    def _turned(self, name: str, turn: Turn, *args: Any, **kwargs: Any) -> Any:
        """In place of the file's function, which runs where the op does not serve."""
        call = turn.convention.read(args, kwargs)
        reason = call if isinstance(call, str) else _why_not(turn, call)
        self._count(reason or "fused")
        if isinstance(call, str) or reason is not None:
            return inspect.unwrap(unmixed(type(self)).forward).__globals__[name](*args, **kwargs)
        q, k, cos, sin, back = call
        return back(*run_rotary(q, k, cos, sin, turn.rotation(q.dtype, cos.dtype)))

    def _count(self, outcome: str) -> None:
        turns = self.__dict__.setdefault("fastpeft_turns", {})
        turns[outcome] = turns.get(outcome, 0) + 1

    def leave(self) -> None:
        """This instance as it was before."""
        for name in ("fastpeft_turn", "fastpeft_turns", "fastpeft_suspended"):
            self.__dict__.pop(name, None)
        swap_out(self, FastRotary)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, FastRotary)


class _Globals(dict[str, Any]):
    """Names of our own; all others are those of `file` at that moment."""

    def __init__(self, file: dict[str, Any], ours: dict[str, Any]) -> None:
        # Builtins are read when a function is made, without asking for what is missing.
        super().__init__(ours, __builtins__=file["__builtins__"])
        self._file = file

    def __missing__(self, name: str) -> Any:
        return self._file[name]


def _with_ours(forward: FunctionType, ours: dict[str, Any]) -> FunctionType:
    """`forward` with `ours` in place of what the file has by these names, within its decorators if it has any.

    A new function costs about a microsecond, so none is kept and none goes stale.
    """
    inner: Any = getattr(forward, "__wrapped__", None)
    names: dict[str, Any] = _Globals(forward.__globals__, ours) if inner is None else forward.__globals__
    closure = forward.__closure__
    if inner is not None and closure is not None:
        closure = tuple(CellType(_with_ours(inner, ours)) if holds(cell, inner) else cell for cell in closure)
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, closure)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _why_not(turn: Turn, call: Turned) -> str | None:
    """Why the file's own function must run, or None."""
    q, cos, sin = call.q, call.cos, call.sin
    k = q if call.k is None else call.k
    if not kernel_serves(q, cos):
        return NO_KERNEL
    batch, _, tokens, dim = q.shape
    turned = 2 * cos.shape[2] if turn.angles == "half" else cos.shape[2]
    whole = turned == dim or (turn.partial and 0 < turned < dim and turned % 2 == 0)
    alike = (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, dim) and cos.shape == sin.shape
    if not whole or not alike or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        return f"inputs of shapes {', '.join(str(tuple(x.shape)) for x in (q, k, cos))}"
    if k.dtype != q.dtype or sin.dtype != cos.dtype or any([x.device != q.device for x in (k, cos, sin)]):
        return "inputs of several dtypes or devices"
    if cos.requires_grad or sin.requires_grad:
        return "angles that are trained"
    return transformed()
