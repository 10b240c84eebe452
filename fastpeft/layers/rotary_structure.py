"""Which modules turn queries and keys by a function of their file, and which rotation it is, proved by trying it."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.rope.api import DTYPES, run_rotary
from fastpeft_kernels.rope.reference import rotary_reference
from fastpeft_kernels.rope.rotation import ANGLES, LAYOUTS, Rotation

from .mixing import unmixed
from .proving import failure, within_budget

NAME = "apply_rotary_pos_emb"
"""By this name the files of transformers' models call it, with (q, k, cos, sin)."""


class Turn(NamedTuple):
    """What a function computes of (q, k, cos, sin).

    Attributes:
        layout, angles: as in `fastpeft_kernels.rope.rotary`.
        like_q: whether the results have q's dtype; else that of a product of q and cos.
        partial: whether cos may have fewer features than q.
    """

    layout: str
    angles: str
    like_q: bool
    partial: bool

    def rotation(self, q: torch.dtype, cos: torch.dtype) -> Rotation:
        """For tensors of these dtypes."""
        return Rotation(self.layout, self.angles, q if self.like_q else torch.promote_types(q, cos))


_KNOWN: dict[tuple[Callable[..., Any], int, str], Turn] = {}
"""What a function turned out to compute, for a size of heads on a kind of device."""


def own_function(module: nn.Module) -> FunctionType | str | None:
    """The function of its file that a module's forward calls by NAME; why that isn't known; None if it calls none."""
    outer: Any = unmixed(type(module)).forward
    if NAME not in getattr(getattr(inspect.unwrap(outer), "__code__", None), "co_names", ()):
        return None
    forward = within_decorators(outer)
    if forward is None or NAME not in forward.__code__.co_names:
        return "its forward is decorated in a way that is not known"
    function = forward.__globals__.get(NAME)
    if not isinstance(function, FunctionType):
        return f"{NAME} was replaced by something that is no function"
    if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(forward)):
        return "its forward writes to globals"
    return function


def within_decorators(forward: Any) -> FunctionType | None:
    """The function that decorators are around: each a function that holds the next one once in its closure, else None.

    transformers 5.24 decorates most forwards, to take an argument by its old name too.
    """
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        if not isinstance(forward, FunctionType) or sum(holds(cell, inner) for cell in forward.__closure__ or ()) != 1:
            return None
        forward = inner
    return forward if isinstance(forward, FunctionType) else None


def holds(cell: CellType, value: Any) -> bool:
    """Whether a cell of a closure holds the very value."""
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def proved(module: nn.Module, function: Callable[..., Any]) -> Turn | str:
    """What `function` computes, or why it isn't known: tried in every dtype that is served, values and gradients.

    Once it is known for heads of one size, it is tried with what was found there in one dtype.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    size: Any = getattr(module, "head_dim", None)
    size = size if type(size) is int and size >= 4 and size % 4 == 0 else 16
    key = (function, size, device.type)
    try:
        if key in _KNOWN and _fits(_KNOWN[key], function, size, device, DTYPES[:1]):
            return _KNOWN[key]
        for layout, angles, like_q in product(LAYOUTS, ANGLES, (False, True)):
            turn = Turn(layout, angles, like_q, partial=False)
            if _fits(turn, function, size, device, DTYPES):
                _KNOWN[key] = turn = turn._replace(partial=_is_partial(turn, function, size, device))
                return turn
    except Exception as error:
        return failure(error)
    return "it turns queries and keys in a way that is not known"


def _is_partial(turn: Turn, function: Callable[..., Any], size: int, device: torch.device) -> bool:
    try:
        return _fits(turn._replace(partial=True), function, size, device, DTYPES)
    except Exception:  # most functions cannot
        return False


def _fits(
    turn: Turn, function: Callable[..., Any], size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> bool:
    return all(_alike(turn, function, *given) for given in _trials(size, turn.partial, device, dtypes))


def _trials(
    size: int, in_part: bool, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """q, k, cos and sin, as a model's projections lie."""
    generator = torch.Generator().manual_seed(0)
    turned = size // 2 if in_part else size
    for dtype, table in [(d, t) for d in dtypes for t in dict.fromkeys((d, torch.float32))]:
        q, k = (
            torch.randn((2, 5, heads, size), generator=generator).to(device, dtype).transpose(1, 2) for heads in (3, 1)
        )
        cos, sin = (torch.randn((2, 5, turned), generator=generator).to(device, table) for _ in range(2))
        yield q, k, cos, sin


def _alike(turn: Turn, function: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    rotation = turn.rotation(q.dtype, cos.dtype)
    wide = rotation._replace(out=torch.float64)
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        theirs = _differentiated(function, q, k, cos, sin)
        ours = _differentiated(partial(run_rotary, rotation=rotation), q, k, cos, sin)
        exact = _differentiated(
            partial(rotary_reference, rotation=wide), q.double(), k.double(), cos.double(), sin.double()
        )
    lowest = max(torch.finfo(t.dtype).eps for t in (q, cos))
    return all(within_budget(a, b, c, lowest) for a, b, c in zip(ours, theirs, exact, strict=True))


def _differentiated(compute: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """The results, and the gradients of q and k where the results' are 1, 2, 3 and so on in each row."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outs = compute(*leaves, cos, sin)
    dys = [torch.arange(1.0, y.shape[-1] + 1, device=y.device).to(y.dtype).expand_as(y) for y in outs]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, dys)]
