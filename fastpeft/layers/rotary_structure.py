"""Which modules turn queries and keys by functions of their file, and which rotations these are, proved by trying."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from itertools import product
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.rope.api import DTYPES, run_rotary
from fastpeft_kernels.rope.reference import rotary_reference
from fastpeft_kernels.rope.rotation import ANGLES, LAYOUTS, Rotation

from .mixing import unmixed
from .proving import within_budget
from .rotary_calls import CONVENTIONS, Convention, Turned

PART = "apply_rotary"
"""Is in the names by which the files of transformers' models call such functions: `apply_rotary_pos_emb` most often."""
UNKNOWN = "it turns queries and keys in a way that is not known"
ELSEWHERE = "it is no name of its file, the only ones that can be ours"
"""Of a function that is called as a method, through a module or by a local name."""
_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_DEREF", "IMPORT_FROM")


class Turn(NamedTuple):
    """What a function computes.

    Attributes:
        layout, angles: as in `fastpeft_kernels.rope.rotary`.
        like_q: whether the results have q's dtype; else that of a product of q and cos.
        partial: whether fewer elements may be turned than q has.
        convention: how it takes its arguments.
    """

    layout: str
    angles: str
    like_q: bool
    partial: bool
    convention: Convention = CONVENTIONS[0]

    def rotation(self, q: torch.dtype, cos: torch.dtype) -> Rotation:
        """For tensors of these dtypes."""
        return Rotation(self.layout, self.angles, q if self.like_q else torch.promote_types(q, cos))


Functions = dict[str, FunctionType]
_KNOWN: dict[tuple[Callable[..., Any], int, str], Turn] = {}
"""What a function turned out to compute, for a size of heads on a kind of device."""


def own_functions(module: nn.Module) -> Functions | str | None:
    """Those of its file that a module's forward calls by such names; why that isn't known; None if it calls none."""
    outer: Any = unmixed(type(module)).forward
    names, others = _names(inspect.unwrap(outer)), names_elsewhere(module)
    if not names:
        return f"{', '.join(others)}: {ELSEWHERE}" if others else None
    forward = within_decorators(outer)
    if forward is None or _names(forward) != names:
        return "its forward is decorated in a way that is not known"
    found: Functions = {}
    for name in names:
        function = forward.__globals__[name]
        if not isinstance(function, FunctionType):
            return f"{name} was replaced by something that is no function"
        found[name] = function
    if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(forward)):
        return "its forward writes to globals"
    return found


def _names(forward: Any) -> list[str]:
    return [name for name in _loaded(forward, "LOAD_GLOBAL") if name in forward.__globals__]


def names_elsewhere(module: nn.Module) -> list[str]:
    """Those that its forward calls otherwise: as methods, through modules."""
    return _loaded(inspect.unwrap(unmixed(type(module)).forward), *_LOADS)


def _loaded(forward: Any, *ways: str) -> list[str]:
    code = getattr(forward, "__code__", None)
    if code is None or not any([PART in name for name in (*code.co_names, *code.co_freevars, *code.co_cellvars)]):
        return []  # looked for first: to disassemble every module's forward takes a second
    found = [step.argval for step in dis.get_instructions(forward) if step.opname in ways]
    return [name for name in dict.fromkeys(found) if PART in name]


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


def proved(module: nn.Module, functions: Functions) -> dict[str, Turn | None] | str:
    """What each function computes, None if that is not known; or why of none it is.

    Tried in every dtype that is served, values and gradients. Once a function is known for heads of one size, it is
    tried with what was found there in one dtype.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    size: Any = getattr(module, "head_dim", None)
    size = size if type(size) is int and size >= 4 and size % 4 == 0 else 16
    found = {name: _turn_of(function, size, device) for name, function in functions.items()}
    return found if any(found.values()) else f"{', '.join(functions)}: {UNKNOWN}"


def _turn_of(function: FunctionType, size: int, device: torch.device) -> Turn | None:
    key = (function, size, device.type)
    if key in _KNOWN and _fits(_KNOWN[key], function, size, device, DTYPES[:1]):
        return _KNOWN[key]
    for convention, layout, angles, like_q in product(CONVENTIONS, LAYOUTS, ANGLES, (False, True)):
        if convention.tables == "complex" and angles != "half":
            continue
        turn = Turn(layout, angles, like_q, partial=False, convention=convention)
        if _fits(turn, function, size, device, DTYPES):
            in_part = turn._replace(partial=True)
            _KNOWN[key] = turn = in_part if _fits(in_part, function, size, device, DTYPES) else turn
            return turn
    return None


def _fits(
    turn: Turn, function: Callable[..., Any], size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> bool:
    try:
        return all(_alike(turn, function, *given) for given in _trials(turn, size, device, dtypes))
    except Exception:  # it takes other arguments
        return False


def _trials(
    turn: Turn, size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor], dict[str, int]]]:
    """What is turned, the tables, and what is passed by name; queries and keys lie as a model's projections do."""
    generator = torch.Generator().manual_seed(0)
    convention, turned = turn.convention, size // 2 if turn.partial else size
    features, rows = turned // 2 if turn.angles == "half" else turned, 2 if convention.batched else 1
    for dtype, table in [(d, t) for d in dtypes for t in dict.fromkeys((d, torch.float32))]:
        for named in convention.ways():
            xs = [torch.randn((rows, 5, heads, size), generator=generator).to(device, dtype) for heads in (3, 1)]
            tables = [torch.randn((rows, 5, features), generator=generator).to(device, table) for _ in range(2)]
            if not (convention.tokens_first or named):
                xs = [x.transpose(1, 2) for x in xs]
            if not convention.batched:
                xs, tables = ([x.squeeze(0) for x in given] for given in (xs, tables))
            if convention.tables == "complex":
                tables = [torch.complex(*(table.float() for table in tables))]
            yield xs[:1] if convention.alone else xs, tables, named


def _alike(
    turn: Turn, function: Callable[..., Any], xs: list[Tensor], tables: list[Tensor], named: dict[str, int]
) -> bool:
    def ours(*given: Tensor, exact: bool = False) -> Any:
        call = turn.convention.read(given, named)
        assert isinstance(call, Turned)
        rotation = turn.rotation(call.q.dtype, call.cos.dtype)
        if exact:
            return call.back(*rotary_reference(*call[:4], rotation._replace(out=torch.float64)))
        return call.back(*run_rotary(*call[:4], rotation))

    wide_tables = [table.to(torch.complex128 if table.is_complex() else torch.float64) for table in tables]
    with torch.enable_grad(), torch.autocast(xs[0].device.type, enabled=False):
        theirs = _differentiated(lambda *xs: function(*xs, *tables, **named), xs)
        mine = _differentiated(lambda *xs: ours(*xs, *tables), xs)
        exact = _differentiated(lambda *xs: ours(*xs, *wide_tables, exact=True), [x.double() for x in xs])
    lowest = max(torch.finfo(t.dtype).eps for t in (xs[0], tables[0]))
    return all(within_budget(a, b, c, lowest) for a, b, c in zip(mine, theirs, exact, strict=True))


def _differentiated(compute: Callable[..., Any], xs: list[Tensor]) -> list[Tensor]:
    """The results, and the gradients of `xs` where the results' are 1, 2, 3 and so on in each row."""
    leaves = [x.detach().requires_grad_() for x in xs]
    outs = compute(*leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    dys = [torch.arange(1.0, y.shape[-1] + 1, device=y.device).to(y.dtype).expand_as(y) for y in outs]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, leaves, dys)]
