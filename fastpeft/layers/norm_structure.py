"""Which modules are norms, told by their parts, and which one each computes, proved by trying it on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.norm.api import run_norm
from fastpeft_kernels.norm.form import ROUNDINGS, Form, layer_form, rms_form
from fastpeft_kernels.norm.reference import norm_reference

from ..integrations.fsdp import is_sharded
from .proving import failure, within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (0.001, 1.0, 30.0, 1.0)
"""Of the rows that are tried: in the first one eps counts."""
_KNOWN: dict[tuple[type[nn.Module], torch.dtype, str], Norm] = {}
"""What instances of a class turned out to compute, in this dtype and on this kind of device."""


class Norm(NamedTuple):
    """What a module's forward computes.

    Attributes:
        rounding: one of `ROUNDINGS`, or "layer" for LayerNorm.
        offset: is added to the weight.
        eps_name: the module's attribute.
        weight_dtype: for which it was proved.
    """

    rounding: str
    offset: float
    eps_name: str
    weight_dtype: torch.dtype

    @property
    def op(self) -> str:
        return "layer_norm" if self.rounding == "layer" else "rms_norm"

    def form(self, dtype: torch.dtype, eps: float) -> Form:
        """For inputs of this dtype."""
        if self.rounding == "layer":
            return _layer_form(dtype, eps)
        return _rms_form(dtype, self.weight_dtype, eps, self.offset, self.rounding)


_layer_form, _rms_form = lru_cache(layer_form), lru_cache(rms_form)


def candidates(module: nn.Module) -> list[Norm]:
    """What a module could compute by its parts: a vector `weight`, perhaps a `bias`, one eps and nothing else.

    torch's own LayerNorm and RMSNorm, and what is derived from them, are one operation already.
    """
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return []
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or weight.dim() != 1 or weight.dtype not in DTYPES:
        return []
    if not parameters.keys() <= {"weight", "bias"} or module._modules or module._buffers:
        return []
    if bias is not None and (bias.shape != weight.shape or bias.dtype != weight.dtype):
        return []
    names = [name for name, value in module.__dict__.items() if "eps" in name and isinstance(value, float)]
    if len(names) != 1 or type(module).forward.__module__.partition(".")[0] == "torch":
        return []
    found = [Norm("layer", 0.0, names[0], weight.dtype)]
    if bias is None:
        found += [Norm(rounding, offset, names[0], weight.dtype) for offset in (0.0, 1.0) for rounding in ROUNDINGS]
    return found


def proved(module: nn.Module, wanted: list[Norm]) -> Norm | str:
    """The one of `wanted` within the budget whose roundings are nearest to the module's, or why there is none.

    Tried is the module's own code on a twin with its parameters, in every dtype that is served, with autocast on and
    off: values and gradients. Ours may err as the ops may: twice as much as the module's does against fp64. Once an
    instance of a class is known, the others are tried in two dtypes, with what was found there first.
    """
    weight: Any = module._parameters["weight"]
    if is_sharded(module):
        return "sharded by itself (fully_shard), so that no twin of it can be tried; accelerate before sharding"
    if weight.is_meta:
        return "its weight is on the meta device, so that it cannot be tried"
    key = (type(module), weight.dtype, weight.device.type)
    try:
        known = [norm for norm in wanted if norm == _KNOWN.get(key)]
        found = _tried(module, known, list(_cases(weight.device))[:2]) if known else {}
        found = found or _tried(module, wanted, list(_cases(weight.device)))
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
    module: nn.Module, wanted: list[Norm], cases: list[tuple[torch.dtype, AbstractContextManager[Any]]]
) -> dict[Norm, float]:
    """Those of `wanted` that fit in all cases, with their distances."""
    distances = dict.fromkeys(wanted, 0.0)
    for dtype, autocast in cases:
        with torch.enable_grad(), autocast:
            _try(module, dtype, distances)
    return distances


def _try(module: nn.Module, dtype: torch.dtype, distances: dict[Norm, float]) -> None:
    """Takes those out of `distances` that do not fit for inputs of `dtype`, and adds to the others' distances."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: _values(p, generator) for name, p in module._parameters.items() if p is not None}
    features = parameters["weight"].shape[0]
    x, dy = (torch.randn((len(SCALES), features), generator=generator) for _ in range(2))
    x = ((x + 0.3) * torch.tensor(SCALES)[:, None]).to(parameters["weight"].device, dtype)
    dy = dy.to(x.device)
    theirs = _differentiated(partial(_forward_of, module), x, parameters, dy)
    for norm in list(distances):
        form = norm.form(dtype, getattr(module, norm.eps_name))
        exact = _exact(form, x, parameters, dy.to(theirs[0].dtype))
        ours = _differentiated(lambda x, p, form=form: run_norm(x, p["weight"], p.get("bias"), form), x, parameters, dy)
        lowest = max(torch.finfo(t).eps for t in (dtype, norm.weight_dtype, theirs[0].dtype))
        pairs = list(zip(ours, theirs, exact, strict=True))
        if all(within_budget(a, b, c, lowest) for a, b, c in pairs):
            plain = norm_reference(x, parameters["weight"], parameters.get("bias"), form)
            distances[norm] += (plain.double() - theirs[0].double()).norm().item()
        else:
            del distances[norm]


def _values(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """To try with: a parameter's own, or others like it where FSDP2 keeps them sharded between forwards."""
    if not hasattr(parameter, "placements"):
        return parameter.detach()
    return torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)


def _forward_of(module: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    twin = type(module).__new__(type(module))
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    twin.__dict__["_parameters"] = dict(module._parameters) | parameters
    y: Tensor = type(module).forward(twin, x)
    return y


def _differentiated(compute: Any, x: Tensor, parameters: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of x and of each parameter."""
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    x = x.clone().requires_grad_()
    y = compute(x, leaves)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves.values()], dy.to(y.dtype))]


def _exact(form: Form, x: Tensor, parameters: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    wide = form._replace(middle=None, out=torch.float64)
    given = {name: p.double() for name, p in parameters.items()}
    with torch.autocast(x.device.type, enabled=False):
        return _differentiated(
            lambda x, p: norm_reference(x, p["weight"], p.get("bias"), wide), x.double(), given, dy.double()
        )
