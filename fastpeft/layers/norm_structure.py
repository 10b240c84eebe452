"""Which modules are norms, told by their parts, and which one each computes, proved by trying it on random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.norm.api import run_norm
from fastpeft_kernels.norm.form import ACTIVATIONS, ROUNDINGS, Form, gated_form, layer_form, rms_form
from fastpeft_kernels.norm.reference import norm_reference

from ..integrations.fsdp import is_sharded
from .proving import failure, within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (0.001, 1.0, 30.0, 1.0)
"""Of the rows that are tried: in the first one eps counts."""
FEATURES = 48
"""Of inputs that norms without a weight are tried with."""
_KNOWN: dict[tuple[type[nn.Module], torch.dtype | None, str], Norm] = {}
"""What instances of a class turned out to compute, in this dtype and on this kind of device."""


class Norm(NamedTuple):
    """What a module's forward computes.

    Attributes:
        rounding: one of `ROUNDINGS`, or "layer" for LayerNorm.
        offset: is added to the weight.
        eps_name: the module's attribute.
        weight_dtype: for which it was proved; None without a weight.
        norm_before_gate, activation, groups: as in `gated_rms_norm`; the first is None for a norm without a gate.
    """

    rounding: str
    offset: float
    eps_name: str
    weight_dtype: torch.dtype | None
    norm_before_gate: bool | None = None
    activation: str = "silu"
    groups: int = 1

    @property
    def op(self) -> str:
        if self.norm_before_gate is not None:
            return "gated_rms_norm"
        return "layer_norm" if self.rounding == "layer" else "rms_norm"

    def form(self, dtype: torch.dtype, eps: float) -> Form:
        """For inputs of this dtype."""
        if self.rounding == "layer":
            return _layer_form(dtype, eps)
        if self.norm_before_gate is not None:
            return _gated_form(dtype, self.weight_dtype or dtype, eps, self.rounding, *self[4:])
        return _rms_form(dtype, self.weight_dtype or dtype, eps, self.offset, self.rounding)


_layer_form, _rms_form, _gated_form = lru_cache(layer_form), lru_cache(rms_form), lru_cache(gated_form)


def candidates(module: nn.Module) -> list[Norm]:
    """What a module could compute by its parts: a vector `weight` or none, perhaps a `bias`, one eps and nothing else.

    With a gate if its forward takes another argument beside x; its groups are a number among the module's.
    torch's own LayerNorm and RMSNorm, and what is derived from them, are one operation already.
    """
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return []
    parameters = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is not None and (weight.dim() != 1 or weight.dtype not in DTYPES):
        return []
    if not parameters.keys() <= {"weight", "bias"} or module._modules or module._buffers:
        return []
    if bias is not None and (weight is None or bias.shape != weight.shape or bias.dtype != weight.dtype):
        return []
    names = [name for name, value in module.__dict__.items() if "eps" in name and isinstance(value, float)]
    if len(names) != 1 or type(module).forward.__module__.partition(".")[0] == "torch":
        return []
    gated = len(inspect.signature(type(module).forward).parameters) > 2  # self and x
    if weight is None:
        return [] if gated else [Norm("once", 0.0, names[0], None)]
    if gated:
        return [] if bias is not None else _gated_candidates(module, Norm("", 0.0, names[0], weight.dtype))
    found = [Norm("layer", 0.0, names[0], weight.dtype)]
    if bias is None:
        found += [Norm(rounding, offset, names[0], weight.dtype) for offset in (0.0, 1.0) for rounding in ROUNDINGS]
    return found


def _gated_candidates(module: nn.Module, norm: Norm) -> list[Norm]:
    features = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    numbers = [n for n in module.__dict__.values() if type(n) is int and n > 0 and features % n == 0]
    groups = dict.fromkeys((1, *numbers, *(features // n for n in numbers)))
    every = product(ROUNDINGS, (True, False), ACTIVATIONS, groups)
    return [Norm(rounding, *norm[1:4], *gate) for rounding, *gate in every]


def proved(module: nn.Module, wanted: list[Norm]) -> Norm | str:
    """The one of `wanted` within the budget whose roundings are nearest to the module's, or why there is none.

    Tried is the module's own code on a twin with its parameters, in every dtype that is served, with autocast on and
    off: values and gradients. Ours may err as the ops may: twice as much as the module's does against fp64. Once an
    instance of a class is known, the others are tried in two dtypes, with what was found there first.
    """
    weight = module._parameters.get("weight")
    device, dtype = (torch.device("cpu"), None) if weight is None else (weight.device, weight.dtype)
    if is_sharded(module):
        return "sharded by itself (fully_shard), so that no twin of it can be tried; accelerate before sharding"
    if device.type == "meta":
        return "its weight is on the meta device, so that it cannot be tried"
    key = (type(module), dtype, device.type)
    try:
        known = [norm for norm in wanted if norm == _KNOWN.get(key)]
        found = _tried(module, known, list(_cases(device))[:2], device) if known else {}
        found = found or _tried(module, wanted, list(_cases(device)), device)
    except Exception as error:
        return failure(error)
    if not found:
        return "it computes none of the known norms"
    _KNOWN[key] = norm = min(found, key=lambda norm: found[norm])
    return norm


def _cases(device: torch.device) -> Iterator[tuple[torch.dtype, AbstractContextManager[Any]]]:
    for dtype in DTYPES:
        yield dtype, torch.autocast(device.type, enabled=False)
    for dtype in DTYPES[:2]:
        yield dtype, torch.autocast(device.type, dtype=torch.bfloat16)


def _tried(
    module: nn.Module,
    wanted: list[Norm],
    cases: list[tuple[torch.dtype, AbstractContextManager[Any]]],
    device: torch.device,
) -> dict[Norm, float]:
    """Those of `wanted` that fit in all cases, with their distances."""
    distances = dict.fromkeys(wanted, 0.0)
    gated = any(norm.norm_before_gate is not None for norm in wanted)
    for dtype, autocast in cases:
        with torch.enable_grad(), autocast:
            for of_gate in dict.fromkeys((dtype, torch.bfloat16)) if gated else (None,):
                _try(module, device, dtype, of_gate, distances)
    return distances


def _try(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    of_gate: torch.dtype | None,
    distances: dict[Norm, float],
) -> None:
    """Takes those out of `distances` that do not fit for inputs of `dtype`, and adds to the others' distances.

    Args:
        of_gate: the gate's dtype; None for norms without one.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = {name: _values(p, generator) for name, p in module._parameters.items() if p is not None}
    features = parameters["weight"].shape[0] if parameters else FEATURES
    x, dy = (torch.randn((len(SCALES), features), generator=generator) for _ in range(2))
    x = ((x + 0.3) * torch.tensor(SCALES)[:, None]).to(device, dtype)
    dy = dy.to(device)
    gate = None if of_gate is None else torch.randn(x.shape, generator=generator).to(device, of_gate)
    xs = [x] if gate is None else [x, gate]
    theirs = _differentiated(partial(_forward_of, module), xs, parameters, dy)
    for norm in list(distances):
        form = norm.form(dtype, getattr(module, norm.eps_name))
        exact = _exact(form, xs, parameters, dy.to(theirs[0].dtype))
        ours = _differentiated(partial(_ours, form), xs, parameters, dy)
        lowest = max(torch.finfo(t).eps for t in (dtype, of_gate or dtype, norm.weight_dtype or dtype, theirs[0].dtype))
        pairs = list(zip(ours, theirs, exact, strict=True))
        if all(within_budget(a, b, c, lowest) for a, b, c in pairs):
            plain = norm_reference(x, parameters.get("weight"), parameters.get("bias"), form, gate)
            distances[norm] += (plain.double() - theirs[0].double()).norm().item()
        else:
            del distances[norm]


def _values(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """To try with: a parameter's own, or others like it where FSDP2 keeps them sharded between forwards."""
    if not hasattr(parameter, "placements"):
        return parameter.detach()
    return torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)


def _forward_of(module: nn.Module, parameters: dict[str, Tensor], *xs: Tensor) -> Tensor:
    twin = type(module).__new__(type(module))
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    twin.__dict__["_parameters"] = dict(module._parameters) | parameters
    y: Tensor = type(module).forward(twin, *xs)
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
