"""Which modules are MLPs that the op can compute: by their parts, and then by what they give on random numbers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.activation.reference import gated_activation_reference

from ..integrations import bitsandbytes, quantised
from ..integrations.transformers import is_conv1d
from .bypass import own_class
from .lora import FastLoraLayer
from .proving import failure

SCALES = (0.3, 1.0, 4.0, 30.0)
"""Of the rows of a proof's input: what their numbers are, about, after a projection."""
WIDTH, FEATURES = 16, 24
"""Sizes of a proof's projections."""


@dataclass(frozen=True)
class Roles:
    """Names of an MLP's children.

    Attributes:
        inner: the projections of its input: (gate, up), one that gives both, or (up,).
        down: the projection back.
        activation: one of `activation.KINDS`.
        bypassed: activation and dropouts, which are not called any more.
        between: those of them that are dropouts of what the down projection reads.
        children: of all its children.
        adapted: whether any projection has adapters.
    """

    inner: tuple[str, ...]
    down: str
    activation: str
    bypassed: tuple[str, ...]
    between: tuple[str, ...]
    children: tuple[str, ...]
    adapted: bool


def candidates(module: nn.Module) -> list[Roles]:
    """All that the module could be by its children alone; empty when it is no MLP."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):  # sliced and appended to
        return []
    children = dict(module.named_children())
    sizes = {name: size for name, child in children.items() if (size := _size(child)) is not None}
    rest = {name: child for name, child in children.items() if name not in sizes}
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if len(sizes) not in (2, 3) or own:
        return []
    if any(next(child.parameters(), None) is not None or any(child.children()) for child in rest.values()):
        return []
    functions = functions_among(rest.values())
    if len(functions) > 1:
        return []
    kinds = KINDS if not functions else [kind for kind in KINDS if computes(functions[0], kind)]
    adapted = any(isinstance(child, FastLoraLayer) for child in children.values())
    found = []
    for *inner, down in permutations(sizes):
        width = sum(sizes[name][1] for name in inner)
        same_input = len({sizes[name][0] for name in inner}) == 1
        even = len(inner) == 1 or sizes[inner[0]][1] == sizes[inner[1]][1]
        factors = (1, 2) if len(inner) == 1 else (2,)
        if same_input and even and width in [factor * sizes[down][0] for factor in factors]:
            found += [Roles(tuple(inner), down, kind, tuple(rest), (), tuple(children), adapted) for kind in kinds]
    return found


def has_activation(module: nn.Module) -> bool:
    """Whether something among the children could be one: without, the projections may as well be attention's."""
    return bool(functions_among(child for child in module.children() if _size(child) is None))


def proved(module: nn.Module, wanted: list[Roles]) -> Roles | str:
    """The one of `wanted` that gives what the module's forward gives, or why there is none; leaves no trace.

    Tried is the module's own code, over small random projections in fp32 in place of its own, so that it costs nothing
    and rounding hides nothing; with `training` on and off, so that a dropout or any other step between the projections
    that is no module shows, and with small and large inputs, so that a clamp shows.
    """
    fitting: list[Roles] = []
    errors: list[Exception] = []
    downs = dict.fromkeys(roles.down for roles in wanted)  # several where all projections are square
    for down in downs:
        alike = [roles for roles in wanted if roles.down == down]
        for features in (FEATURES, _features(module.get_submodule(down), 0)):  # some forwards know their size
            try:
                fitting += _fitting(module, alike, features)
                break
            except Exception as error:
                failed = error
        else:
            errors.append(failed)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        return "it computes more than one known MLP alike"
    if len(errors) == len(downs):
        return failure(errors[0])
    return "it computes something else than an MLP"


def _fitting(module: nn.Module, wanted: list[Roles], features: int) -> list[Roles]:
    """Those of `wanted`, alike but for order and activation, that give what the module's forward gives.

    Where a dropout stands shows with `_told_apart` in its place, which is neither linear nor commutes with powers or
    products, so that it shows if it stands twice or before any other step.
    """
    generator = torch.Generator().manual_seed(0)
    twin: Any = _twin(module, wanted[0], features, generator)
    x = torch.randn((2, len(SCALES), WIDTH), generator=generator) * torch.tensor(SCALES)[:, None]

    def given(training: bool = True) -> Any:
        twin.training = training
        return type(module).forward(twin, x)

    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        plain = [given(), given(training=False)]
        found = [roles for roles in wanted if all(close_by_rows(_composed(twin, roles, x, features), y) for y in plain)]
        between = []
        for name in [name for name in wanted[0].bypassed if type(twin.get_submodule(name)) is nn.Dropout]:
            dropout, twin._modules[name] = twin._modules[name], _Mark(twin._modules[name].p)
            try:
                marked = given()
            except Exception:  # it is left to the module while it drops
                continue
            finally:
                twin._modules[name] = dropout
            if all(close_by_rows(_composed(twin, roles, x, features, _told_apart), marked) for roles in found):
                between.append(name)
    return [replace(roles, between=tuple(between)) for roles in found]


class _Mark(nn.Dropout):
    """In the place of a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return _told_apart(x)


def _told_apart(x: Tensor) -> Tensor:
    return x.square() + x


def _twin(module: nn.Module, roles: Roles, features: int, generator: torch.Generator) -> nn.Module:
    """The module with small projections in place of its own, on the CPU, without hooks, dropouts off."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name != "forward"})
    twin.__dict__["_modules"] = parts = dict(module._modules)
    for name, child in module.named_children():
        size = _size(child)
        if size is None:
            parts[name] = copied = copy.deepcopy(child).eval().cpu()
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                copied.__dict__[hooks] = OrderedDict()
            continue
        times = size[1] // _features(module.get_submodule(roles.down), 0)
        out, into = (WIDTH, features) if name == roles.down else (times * features, WIDTH)
        parts[name] = linear = nn.Linear(into, out, bias=_base(child).bias is not None, device="meta")
        for kind, parameter in list(linear.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator) / into**0.5
            setattr(linear, kind, nn.Parameter(values, requires_grad=False))
    return twin


def _base(module: Any) -> Any:
    return module._modules["base_layer"] if isinstance(module, FastLoraLayer) else module


def _size(module: Any) -> tuple[int, int] | None:
    """(in, out) of a projection that the op can read, else None."""
    base = _base(module)
    if own_class(base) is nn.Linear or bitsandbytes.is_linear_4bit(base) or quantised.reader(base) is not None:
        return base.in_features, base.out_features
    return (base.nx, base.nf) if is_conv1d(base) else None


def _features(module: Any, which: int) -> int:
    size = _size(module)
    assert size is not None
    return size[which]


def functions_among(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if not isinstance(module, (nn.Dropout, nn.Identity))]


def computes(function: nn.Module, kind: str) -> bool:
    """Whether an activation is the one of this name, within fp32's rounding."""
    x = torch.linspace(-8.0, 8.0, 101)
    with torch.no_grad():
        try:
            y = type(function).forward(function, x)
        except Exception:
            return False
    return isinstance(y, Tensor) and torch.allclose(y, gated_activation_reference(None, x, kind), rtol=1e-5, atol=1e-6)


def _composed(
    twin: Any, roles: Roles, x: Tensor, features: int, between: Callable[[Tensor], Tensor] = lambda h: h
) -> Tensor:
    pre = [twin.get_submodule(name)(x) for name in roles.inner]
    if len(pre) == 2:
        gate, up = pre
    else:
        gate, up = pre[0].chunk(2, dim=-1) if pre[0].shape[-1] == 2 * features else (None, pre[0])
    y: Tensor = twin.get_submodule(roles.down)(between(gated_activation_reference(gate, up, roles.activation)))
    return y


def close_by_rows(ours: Tensor, theirs: Any) -> bool:
    """Equal within rounding, row by row: wrong structures are off by far more."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    difference, size = (ours.double() - theirs.double()).norm(dim=-1), theirs.double().norm(dim=-1)
    return bool((difference <= 64 * torch.finfo(theirs.dtype).eps * size).all()) and bool(theirs.any())
