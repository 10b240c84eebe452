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

TOKENS = 4
"""Rows of the random input of a proof."""


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
    projections that is no module shows.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return "its weights are not loaded, so that what it computes could not be tried"
    inner = module.get_submodule(wanted[0].inner[0])
    size = _features(inner)
    assert size is not None
    try:
        with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []), _as_stock(module):
            torch.manual_seed(0)
            x = torch.randn(1, TOKENS, size[0], device=weight.device, dtype=_dtype(inner))
            x = x * (2.0 / (inner(x).float().std() + 1e-6)).to(x.dtype)
            given = []
            for training in (True, False):
                module.training = training
                given.append(module.forward(x))
            fitting = [roles for roles in wanted if all(_close(_composed(module, roles, x), y) for y in given)]
    except Exception as error:
        return f"trying it failed with {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
    if len(fitting) != 1:
        return "it computes something else than an MLP" if not fitting else "it computes more than one known MLP alike"
    return fitting[0]


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
    """Equal within rounding: the chain is short, and wrong structures are off by about their whole size."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= 16 * torch.finfo(theirs.dtype).eps * theirs.double().norm()) and bool(theirs.any())


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
