"""PEFT's LoHa and LoKr over linear layers, without a product of its own for the update: same tree, same parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_dtype, product_dtype
from fastpeft_kernels.lycoris import loha_linear, lokr_linear
from fastpeft_kernels.weights import FrozenWeight

from ..integrations import lycoris
from ..integrations.tuner_layers import why_not_plain
from .bypass import why_not_called
from .counting import Counting
from .merges import SeenMerges
from .naming import NamedAsPeft
from .requests import frozen_base


class FastLycorisLayer(NamedAsPeft, SeenMerges, Counting, nn.Module):
    """Mixed in before PEFT's layer class; overrides `forward`, and marks the base as changed by a merge."""

    op_name: str
    op: Any
    fastpeft_suspended: bool = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fastpeft_suspended:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        found = why_not_called(self, x, args, kwargs) or self.request(x)
        if isinstance(found, str):
            self._count(found)
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        self._count("fused")
        weight, adapters = found
        base: Any = self._modules["base_layer"]
        if not adapters:
            return base(x).to(x.dtype)  # type: ignore[no-any-return]
        return self.op(x, weight, adapters, bias=base._parameters["bias"])  # type: ignore[no-any-return]

    def request(self, x: Tensor) -> tuple[FrozenWeight, Sequence[Any]] | str:
        """What to compute for x, or why PEFT's own forward must run; random numbers are drawn for the former alone."""
        if torch.compiler.is_compiling():
            return "torch.compile tracing"
        base: Any = self._modules["base_layer"]
        found = frozen_base(base, x, autocast_dtype(x.device))
        if isinstance(found, str):
            return found
        reason = self.why_not_multiplied(x) or why_not_plain(base._parameters["bias"], x.device)
        if reason is not None:
            return reason
        adapters = lycoris.used_adapters(self, x.device)
        return adapters if isinstance(adapters, str) else (found[0], adapters)

    def base_parameter(self) -> nn.Parameter | None:
        return self.get_submodule("base_layer")._parameters["weight"]

    def why_not_multiplied(self, x: Tensor) -> str | None:
        """Why the products' dtype is not the op's, or None."""
        return None


class FastLohaLayer(FastLycorisLayer):
    op_name = "loha_linear"
    op = staticmethod(loha_linear)

    def why_not_multiplied(self, x: Tensor) -> str | None:
        """The op adds weight and update, in fp32: where PEFT multiplies in 16 bits, it is the faster one."""
        layer: Any = self
        dtype = autocast_dtype(x.device) or x.dtype
        if autocast_dtype(x.device) is None:
            for name in layer.active_adapters:
                if name in layer.hada_w1_a:
                    dtype = torch.promote_types(dtype, layer.hada_w1_a[name].dtype)
        dtype = product_dtype(dtype, x.device)
        return f"LoHa in {dtype}, in which weight and update cannot be added" if dtype.itemsize < 4 else None


class FastLokrLayer(FastLycorisLayer):
    op_name = "lokr_linear"
    op = staticmethod(lokr_linear)


@cache
def fast_classes() -> dict[type[nn.Module], type[Any]]:
    """PEFT's layer class -> ours; made when PEFT is first needed."""
    from peft.tuners.loha.layer import Linear as Loha
    from peft.tuners.lokr.layer import Linear as Lokr

    return {Loha: _make("FastLoha", FastLohaLayer, Loha), Lokr: _make("FastLokr", FastLokrLayer, Lokr)}


def _make(name: str, fast: type[FastLycorisLayer], stock: type[nn.Module]) -> type[FastLycorisLayer]:
    """A module attribute, so that instances can be pickled."""
    made = type(name, (fast, stock), {"__module__": __name__, "__doc__": f"{stock.__module__}.Linear of PEFT."})
    globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    """Unpickling looks the classes up by name."""
    if name in ("FastLoha", "FastLokr"):
        fast_classes()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
