"""Which norm a module computes, proved by trying its own code on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.norm.api import run_norm
from fastpeft_kernels.norm.form import Form
from fastpeft_kernels.norm.reference import norm_reference

from ..integrations.fsdp import is_sharded
from .norm_structure import DTYPES, Norm, settings
from .proving import failure, within_budget

SCALES = (0.001, 1.0, 30.0, 1.0, 0.1, 3.0, 1.0, 0.3)
"""Of the rows that are tried: in the first one eps counts."""
OUTLIER = 100.0
"""One number of each of the last two rows, about, times its scale: what is normalised is then as large as it can be."""
ROWS = {3: (2, 4), 2: (8,), 4: (2, 2, 2)}
"""How these rows lie in inputs of so many dimensions: none has one element, so that it shows which are normalised."""
FEATURES = (48, 80)
"""Of inputs that norms without a weight are tried with: two, so that a size that such a norm has in mind shows."""
_KNOWN: dict[tuple[type[nn.Module], torch.dtype | None, str], Norm] = {}
"""What instances of a class turned out to compute, in this dtype and on this kind of device."""


def proved(module: nn.Module, wanted: list[Norm]) -> Norm | str:
    """The one of `wanted` within the budget whose roundings are nearest to the module's, or why there is none.

    Tried is the module's own code on a twin with its parameters, training and not, in every dtype that is served, with
    autocast on and off: values and gradients. Ours may err as the ops may: twice as much as the module's does against
    fp64. Once an instance of a class is known, the others are tried in two dtypes, with what was found there first;
    else with a gate first, if there may be one.
    """
    weight = module._parameters.get("weight")
    device, dtype = (torch.device("cpu"), None) if weight is None else (weight.device, weight.dtype)
    if is_sharded(module):
        return "sharded by itself (fully_shard), so that no twin of it can be tried; accelerate before sharding"
    if device.type == "meta":
        return "its weight is on the meta device, so that it cannot be tried"
    key = (type(module), dtype, device.type)
    known = [norm for norm in wanted if norm == _KNOWN.get(key)]
    apart = [[norm for norm in wanted if (norm.norm_before_gate is not None) is gated] for gated in (True, False)]
    attempts = [(norms, cases) for norms, cases in ((known, 2), (apart[0], 5), (apart[1], 5)) if norms]
    errors: list[Exception] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for norms, cases in attempts:
            try:
                found = _nearest(module, norms, list(_cases(device))[:cases], device)
            except Exception as error:
                errors.append(error)
                continue
            if found is not None:
                _KNOWN[key] = found._replace(dimensions=())
                read = [(name, value) for name, value in settings(module) if name != found.eps_name]
                return found._replace(settings=tuple(read))
    return failure(errors[0]) if len(errors) == len(attempts) else "it computes none of the known norms"


def _cases(device: torch.device) -> Iterator[tuple[torch.dtype, AbstractContextManager[Any]]]:
    for dtype in DTYPES:
        yield dtype, torch.autocast(device.type, enabled=False)
    for dtype in DTYPES[:2]:
        yield dtype, torch.autocast(device.type, dtype=torch.bfloat16)


def _nearest(
    module: nn.Module,
    wanted: list[Norm],
    cases: list[tuple[torch.dtype, AbstractContextManager[Any]]],
    device: torch.device,
) -> Norm | None:
    """The one of `wanted`, all with a gate or all without, that fits in all cases, if any.

    In the first case inputs have every number of dimensions that the module takes, in the others one.

    Raises:
        Exception: what the module's code raised, if it takes none or fails in another case.
    """
    distances = dict.fromkeys(wanted, 0.0)
    gated = wanted[0].norm_before_gate is not None
    parameters = _parameters(module)
    widths = (parameters["weight"].shape[0],) if parameters else FEATURES
    xs, _ = _inputs(widths[0], torch.float32, torch.float32 if gated else None, device)
    taken = _taken(module, parameters, xs)
    for i, (dtype, autocast) in enumerate(cases):
        with torch.enable_grad(), autocast:
            of_gates = dict.fromkeys((dtype, torch.bfloat16)) if gated else (None,)
            for features, of_gate in product(widths, of_gates):
                xs, dy = _inputs(features, dtype, of_gate, device)
                _try(module, parameters, xs, dy, taken[: 1 if i else None], distances)
                if not distances:
                    return None
    return min(distances, key=lambda norm: distances[norm])._replace(dimensions=tuple(taken))


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a norm's own values, or others like them where FSDP2 keeps them sharded between forwards."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            made = torch.randn(parameter.shape, generator=generator) if hasattr(parameter, "placements") else parameter
            found[name] = made.detach().to(parameter.device, parameter.dtype, copy=True)
    return found


def _inputs(
    features: int, dtype: torch.dtype, of_gate: torch.dtype | None, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """(x and perhaps a gate, a gradient of the result), each of (rows, features)."""
    generator = torch.Generator().manual_seed(1)
    x, dy, gate = (torch.randn((len(SCALES), features), generator=generator) for _ in range(3))
    x += 0.3
    if of_gate is None:  # of what a gate comes before, gradients would be mostly rounding
        x[-1, 0], x[-2, -1] = OUTLIER, -OUTLIER
    gate[1, 0], gate[3, -1] = 12.0, -12.0
    x = (x * torch.tensor(SCALES)[:, None]).to(device, dtype)
    return [x, *([] if of_gate is None else [gate.to(device, of_gate)])], dy.to(device)


def _taken(module: nn.Module, parameters: dict[str, Tensor], xs: list[Tensor]) -> list[int]:
    """For which numbers of dimensions the module's code runs, and writes to nothing.

    Raises:
        Exception: what it raised, if for none.
    """
    found: list[int] = []
    errors: list[Exception] = []
    with torch.no_grad(), torch.autocast(xs[0].device.type, enabled=False):
        for number in ROWS:
            try:
                for training in (True, False):
                    _run_watched(_twin(module, training, parameters), _viewed(xs, number))
                found.append(number)
            except Exception as error:
                errors.append(error)
    if not found:
        raise errors[0]
    return found


def _run_watched(twin: nn.Module, xs: list[Tensor]) -> None:
    held = [parameter for parameter in twin._parameters.values() if parameter is not None]
    state, given, before = dict(vars(twin)), [x.clone() for x in xs], [parameter.clone() for parameter in held]
    type(twin).forward(twin, *given)
    same = all(state.get(name) is value for name, value in vars(twin).items()) and len(state) == len(vars(twin))
    if not same or not all(map(torch.equal, held, before)):
        raise RuntimeError("its forward writes to its attributes")
    if not all(map(torch.equal, xs, given)):
        raise RuntimeError("its forward writes to its input")


def _try(
    module: nn.Module,
    parameters: dict[str, Tensor],
    xs: list[Tensor],
    dy: Tensor,
    dimensions: list[int],
    distances: dict[Norm, float],
) -> None:
    """Takes those out of `distances` that do not fit, and adds to the others' distances.

    Args:
        xs, dy: as of `_inputs`.
        dimensions: the module is given inputs of each of these numbers, training; of the first one not training, too.
    """
    theirs = []
    for number, training in ((dimensions[0], False), *((number, True) for number in dimensions)):
        twin = _twin(module, training, parameters)
        *given, gradient = _viewed([*xs, dy], number)
        theirs.append(_differentiated(partial(_forward_of, twin), given, parameters, gradient))
    y = theirs[0][0]
    lowest = max(torch.finfo(t.dtype).eps for t in (*xs, *parameters.values(), y))
    for norm in list(distances):
        form = norm.form(xs[0].dtype, getattr(module, norm.eps_name))
        exact = _exact(form, xs, parameters, dy.to(y.dtype))
        ours = _differentiated(partial(_ours, form), xs, parameters, dy)
        if all(_alike(ours, found, exact, lowest) for found in theirs):
            plain = norm_reference(xs[0], parameters.get("weight"), parameters.get("bias"), form, *xs[1:])
            distances[norm] += (plain.double() - y.double().view(plain.shape)).norm().item()
        else:
            del distances[norm]


def _alike(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], eps: float) -> bool:
    """Whether results of matrices are those of the same rows in other dimensions: of y and x, a gate, parameters."""
    shapes = [theirs[1].shape if a.dim() == 2 else a.shape for a in ours]
    pairs = zip(ours, theirs, exact, shapes, strict=True)
    return all(within_budget(a.view(shape), b, c.view(shape), eps) for a, b, c, shape in pairs)


def _viewed(xs: list[Tensor], number: int) -> list[Tensor]:
    return [x.view(*ROWS[number], x.shape[-1]) for x in xs]


def _twin(module: nn.Module, training: bool, parameters: dict[str, Tensor]) -> nn.Module:
    twin = type(module).__new__(type(module))
    state = {name: value for name, value in module.__dict__.items() if name != "forward"}
    twin.__dict__.update(state, training=training, _parameters=dict(module._parameters) | parameters)
    return twin


def _forward_of(twin: nn.Module, parameters: dict[str, Tensor], *xs: Tensor) -> Tensor:
    twin._parameters.update(parameters)  # type: ignore[arg-type]
    y: Tensor = type(twin).forward(twin, *xs)
    return y


def _ours(form: Form, parameters: dict[str, Tensor], x: Tensor, gate: Tensor | None = None) -> Tensor:
    return run_norm(x, parameters.get("weight"), parameters.get("bias"), form, gate=gate)


def _differentiated(compute: Any, xs: list[Tensor], parameters: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, of the gate and of each parameter."""
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    xs = [x.clone().requires_grad_() for x in xs]
    y = compute(leaves, *xs)
    return [y.detach(), *torch.autograd.grad(y, [*xs, *leaves.values()], dy.to(y.dtype))]


def _exact(form: Form, xs: list[Tensor], parameters: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    wide = form._replace(middle=None, out=torch.float64)
    given = {name: p.double() for name, p in parameters.items()}

    def compute(parameters: dict[str, Tensor], x: Tensor, gate: Tensor | None = None) -> Tensor:
        return norm_reference(x, parameters.get("weight"), parameters.get("bias"), wide, gate)

    with torch.autocast(xs[0].device.type, enabled=False):
        return _differentiated(compute, [x.double() for x in xs], given, dy.double())
