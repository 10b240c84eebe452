"""Which modules could be norms, told by their parts, and what one computes, once it is proved."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.norm.form import ACTIVATIONS, ROUNDINGS, Form, gated_form, layer_form, rms_form

from .mixing import unmixed
from .proving import takes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (bool, int, float, str, tuple, torch.Size, torch.dtype, torch.device, type(None))
"""Settings of these types are the same if they are equal; others if they are the very same."""
_ANY_MODULE_S = frozenset(vars(nn.Module()))


class Norm(NamedTuple):
    """What a module's forward computes.

    Attributes:
        rounding: one of `ROUNDINGS`, or "layer" for LayerNorm.
        offset: is added to the weight.
        eps_name: the module's attribute.
        weight_dtype: for which it was proved; None without a weight.
        norm_before_gate, activation, groups: as in `gated_rms_norm`; the first is None for a norm without a gate.
        dimensions: for which numbers of them it was proved.
        settings: what else the module's forward could read, by name, as it was then.
    """

    rounding: str
    offset: float
    eps_name: str
    weight_dtype: torch.dtype | None
    norm_before_gate: bool | None = None
    activation: str = "silu"
    groups: int = 1
    dimensions: tuple[int, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

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
            return _gated_form(dtype, self.weight_dtype or dtype, eps, self.rounding, *self[4:7])
        return _rms_form(dtype, self.weight_dtype or dtype, eps, self.offset, self.rounding)


_layer_form, _rms_form, _gated_form = lru_cache(layer_form), lru_cache(rms_form), lru_cache(gated_form)


def candidates(module: nn.Module) -> list[Norm]:
    """What a module could compute by its parts: a vector `weight` or none, perhaps a `bias`, one eps and nothing else.

    With a gate if its forward takes another argument beside x, which may be left out where it also could be without;
    its groups are a number among the module's. What holds tensors or containers of its own, which could be written to
    unseen, is none. torch's own LayerNorm and RMSNorm, and what is derived from them, are one operation already.
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
    if any(isinstance(value, (Tensor, list, dict, set)) for _, value in settings(module)):
        return []
    if weight is None:
        return [Norm("once", 0.0, names[0], None)] if takes(module, 1) else []
    gated = takes(module, 2) and bias is None
    found = _gated_candidates(module, Norm("", 0.0, names[0], weight.dtype)) if gated else []
    if not takes(module, 1):
        return found
    found += [Norm("layer", 0.0, names[0], weight.dtype)]
    if bias is None:
        found += [Norm(rounding, offset, names[0], weight.dtype) for offset in (0.0, 1.0) for rounding in ROUNDINGS]
    return found


def settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What beside its parameters a norm's forward could read: its attributes, and its class's that are plain values."""
    kinds = unmixed(type(module)).__mro__
    classes = kinds[: kinds.index(nn.Module)]
    for name in dict.fromkeys([*module.__dict__, *(name for kind in classes for name in vars(kind))]):
        value = getattr(module, name, None)
        ours = name in _ANY_MODULE_S or name.startswith(("__", "fastpeft_"))
        if not ours and (isinstance(value, _PLAIN) or (name in module.__dict__ and not name.startswith("_"))):
            yield name, value


def changed(module: nn.Module, norm: Norm) -> str | None:
    """Which of its settings is another one than when it was proved; or None. eps may be any."""
    for name, before in norm.settings:
        now = getattr(module, name, None)
        if now is not before and (type(now) is not type(before) or not isinstance(now, _PLAIN) or now != before):
            return name
    return None


def _gated_candidates(module: nn.Module, norm: Norm) -> list[Norm]:
    features = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    numbers = [n for n in module.__dict__.values() if type(n) is int and n > 0 and features % n == 0]
    groups = dict.fromkeys((1, *numbers, *(features // n for n in numbers)))
    every = product(ROUNDINGS, (True, False), ACTIVATIONS, groups)
    return [Norm(rounding, *norm[1:4], *gate) for rounding, *gate in every]
