"""Which modules are MLPs that the op can compute: by their parts, and then by what they give on random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.activation.reference import gated_activation_reference

from ..integrations import bitsandbytes
from .lora import FastLoraLayer

SCALES = (0.3, 1.0, 4.0, 30.0)
"""Of the rows of a proof's input: what their numbers are, about, after a projection."""


@dataclass(frozen=True)
class Roles:
    """Names of an MLP's children.

    Attributes:
        inner: the projections of its input: (gate, up), one that gives both, or (up,).
        down: the projection back.
        activation: one of `activation.KINDS`.
        bypassed: activation and dropouts, which are not called any more.
        adapted: whether any projection has adapters.
    """

    inner: tuple[str, ...]
    down: str
    activation: str
    bypassed: tuple[str, ...]
    adapted: bool


def candidates(module: nn.Module) -> list[Roles]:
    """All that the module could be by its children alone; empty when it is no MLP."""
    children = dict(module.named_children())
    sizes = {name: size for name, child in children.items() if (size := _features(child)) is not None}
    rest = {name: child for name, child in children.items() if name not in sizes}
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if len(sizes) not in (2, 3) or own:
        return []
    if any(next(child.parameters(), None) is not None or any(child.children()) for child in rest.values()):
        return []
    functions = _functions(rest.values())
    if len(functions) > 1:
        return []
    kinds = KINDS if not functions else [kind for kind in KINDS if _computes(functions[0], kind)]
    adapted = any(isinstance(child, FastLoraLayer) for child in children.values())
    found = []
    for *inner, down in permutations(sizes):
        width = sum(sizes[name][1] for name in inner)
        same_input = len({sizes[name][0] for name in inner}) == 1
        even = len(inner) == 1 or sizes[inner[0]][1] == sizes[inner[1]][1]
        factors = (1, 2) if len(inner) == 1 else (2,)
        if same_input and even and width in [factor * sizes[down][0] for factor in factors]:
            found += [Roles(tuple(inner), down, kind, tuple(rest), adapted) for kind in kinds]
    return found


def has_activation(module: nn.Module) -> bool:
    """Whether something among the children could be one: without, the projections may as well be attention's."""
    return bool(_functions(child for child in module.children() if _features(child) is None))


def proved(module: nn.Module, wanted: list[Roles]) -> Roles | str:
    """The one of `wanted` that gives what the module gives, or why there is none; changes nothing.

    Tried in the dtype of the weights, with `training` on and off, so that a dropout or any other step between the
    projections that is no module shows, and with small and large inputs, so that a clamp shows.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return "its weights are not loaded, so that what it computes could not be tried"
    fitting: list[Roles] = []
    errors: list[Exception] = []
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []), _as_stock(module):
        for first in dict.fromkeys(roles.inner[0] for roles in wanted):
            torch.manual_seed(0)
            try:
                x = _random_input(module.get_submodule(first), weight.device)
                given = []
                for training in (True, False):
                    module.training = training
                    given.append(module.forward(x))
                alike = [roles for roles in wanted if roles.inner[0] == first]
                fitting += [r for r in alike if all(_close(_composed(module, r, x), y) for y in given)]
            except Exception as error:  # an input of a size that the module does not take, most likely
                errors.append(error)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        return "it computes more than one known MLP alike"
    if len(errors) == len({roles.inner[0] for roles in wanted}):
        return f"trying it failed with {type(errors[0]).__name__}: {str(errors[0]).partition(chr(10))[0][:100]}"
    return "it computes something else than an MLP"


def _random_input(projection: nn.Module, device: torch.device) -> Tensor:
    """(1, rows, in_features), of which the projection makes numbers from small to large."""
    size = _features(projection)
    assert size is not None
    x = torch.randn(1, len(SCALES), size[0], device=device, dtype=_dtype(projection))
    x = x * (1.0 / (projection(x).float().std() + 1e-6)).to(x.dtype)
    return x * torch.tensor(SCALES, device=device, dtype=x.dtype)[:, None]


def _base(module: Any) -> Any:
    return module._modules["base_layer"] if isinstance(module, FastLoraLayer) else module


def _features(module: Any) -> tuple[int, int] | None:
    """(in, out) of a projection that the op can read, else None."""
    base = _base(module)
    if type(base) is nn.Linear or bitsandbytes.is_linear_4bit(base):
        return base.in_features, base.out_features
    return None


def _dtype(inner: Any) -> torch.dtype:
    base = _base(inner)
    if bitsandbytes.is_linear_4bit(base):
        return base.compute_dtype or torch.float32  # type: ignore[no-any-return]
    return base.weight.dtype  # type: ignore[no-any-return]


def _functions(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if not isinstance(module, (nn.Dropout, nn.Identity))]


def _computes(function: nn.Module, kind: str) -> bool:
    """Whether an activation is the one of this name, within fp32's rounding."""
    x = torch.linspace(-8.0, 8.0, 101)
    with torch.no_grad():
        try:
            y = function(x)
        except Exception:
            return False
    return isinstance(y, Tensor) and torch.allclose(y, gated_activation_reference(None, x, kind), rtol=1e-5, atol=1e-6)


def _composed(module: nn.Module, roles: Roles, x: Tensor) -> Tensor:
    pre = [module.get_submodule(name)(x) for name in roles.inner]
    if len(pre) == 2:
        gate, up = pre
    else:
        down_size = _features(module.get_submodule(roles.down))
        assert down_size is not None
        both = pre[0].shape[-1] == 2 * down_size[0]
        gate, up = pre[0].chunk(2, dim=-1) if both else (None, pre[0])
    return module.get_submodule(roles.down)(gated_activation_reference(gate, up, roles.activation))  # type: ignore[no-any-return]


def _close(ours: Tensor, theirs: Any) -> bool:
    """Equal within rounding, row by row: the chain is short, and wrong structures are off by about their whole size."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    difference, size = (ours.double() - theirs.double()).norm(dim=-1), theirs.double().norm(dim=-1)
    return bool((difference <= 16 * torch.finfo(theirs.dtype).eps * size).all()) and bool(theirs.any())


@contextmanager
def _as_stock(module: nn.Module) -> Iterator[None]:
    """PEFT's own forward in the projections, dropouts off, packing by bitsandbytes forbidden; as before afterwards."""
    training = [(m, m.training) for m in module.modules()]
    layers = [m for m in module.children() if isinstance(m, FastLoraLayer)]
    four_bit = [m for m in module.modules() if bitsandbytes.is_linear_4bit(m)]
    packing = [bitsandbytes.forbid_cpu_packing(m) for m in four_bit]
    settled = [(m, m.compute_type_is_set, m.compute_dtype) for m in four_bit]
    try:
        module.eval()
        for layer in layers:
            layer.fastpeft_suspended = True
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("fastpeft_suspended", None)
        for m, before in zip(four_bit, packing, strict=True):
            bitsandbytes.allow_cpu_packing(m, before)
        for m, is_set, dtype in settled:
            m.compute_type_is_set, m.compute_dtype = is_set, dtype
        for m, was in training:
            m.training = was
