"""PEFT's LoRA layers with a fused forward: same tree, same parameters, same everything else.

A layer becomes one of these by a swap of `__class__`. Each forward reads the layer's state anew; whatever the op does
not cover runs PEFT's own forward, and the reason is kept for the report.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.lora import Dtypes, LoraProjection
from fastpeft_kernels.lora.api import draw_seeds, run_group
from fastpeft_kernels.lora.projection import few_without_gradients
from fastpeft_kernels.weights import DenseWeight, FrozenWeight

from ..integrations import bitsandbytes, peft
from .bypass import global_reason, why_not_bypassed
from .siblings import Sibling
from .watching import SiblingWatch

FEW_TOKENS = "a few tokens without gradients"
"""Under this name calls are counted that are left to PEFT, or to the model's MLP, by choice."""


class Request(NamedTuple):
    """What a layer asks of the op for one input."""

    projection: LoraProjection
    dtypes: Dtypes


class FastLoraLayer(Sibling):
    """Mixed in before a PEFT LoRA layer class; overrides `forward`, and marks the base as changed by a merge.

    What else it keeps is in instance attributes of these names; `leave` takes them away again.
    """

    fastpeft_watch: SiblingWatch | None = None
    fastpeft_cpu_packing: bool | None = None
    adapted = True

    def request(self, x: Tensor) -> Request | str:
        """What to compute for x, or why PEFT's own forward must run."""
        base = self._modules["base_layer"]
        autocast = autocast_dtype(x.device)
        found = frozen_base(base, x, autocast)
        if isinstance(found, str):
            return found
        weight, compute_dtype, out_dtype = found
        bias = base._parameters["bias"]  # type: ignore[union-attr]
        reason = peft.why_not_plain(bias, x.device)
        if reason is not None:
            return f"base layer: {reason}"
        adapters = peft.active_adapters(self, x.device)
        if isinstance(adapters, str):
            return adapters
        dtype = lora_dtype(adapters, autocast, x.dtype)
        if isinstance(dtype, str):
            return dtype
        return Request(LoraProjection(weight, bias, adapters), Dtypes(compute_dtype, dtype, out_dtype))

    def state(self, x: Tensor) -> tuple[Any, ...]:
        layer: Any = self
        adapters = layer.active_adapters
        return (
            *super().state(x),
            layer._disable_adapters,
            layer.training,
            tuple(layer.merged_adapters),
            tuple(adapters),
            *[layer.scaling.get(name) for name in adapters],
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fastpeft_suspended:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        if is_few(x) and self.leaves_few(x):
            self._count(FEW_TOKENS)
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        reason = why_not_called(self, x, args, kwargs)
        if reason is None:
            group = self.fastpeft_group
            held = None if group is None else group.take(self, x)
            if held is not None:
                self._count("fused")
                return held
            request = self.request(x)
            if not isinstance(request, str):
                self._count("fused")
                if group is None:
                    return compute(x, [request])[0]
                return group.compute(self, x, request)
            reason = request
        self._count(reason)
        return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]

    def leaves_few(self, x: Tensor) -> bool:
        """Whether PEFT's own forward is at least as fast for a few tokens; looking at this layer would take longer.

        Not where something is dropped: under reentrant checkpointing a forward without gradients must draw as ours.
        """
        if self._disable_adapters or self.merged_adapters:
            return True
        if x.device.type == "cpu" and bitsandbytes.is_linear_4bit(self._modules["base_layer"]):  # type: ignore[arg-type]
            return False  # our decoding is the faster one
        dropouts = self._modules["lora_dropout"]._modules.values()  # type: ignore[union-attr]
        return not any([type(dropout) is not nn.Identity and dropout.training for dropout in dropouts])  # type: ignore[union-attr]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        super().merge(*args, **kwargs)  # type: ignore[misc]
        self._base_changed()

    def unmerge(self) -> None:
        super().unmerge()  # type: ignore[misc]
        self._base_changed()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT asks for the base layer, to put it in this layer's place."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.leave()
        return self.get_base_layer()  # type: ignore[operator, no-any-return]

    def enter(self) -> None:
        """Called by `accelerate`: guard the base layer's storage."""
        if "fastpeft_cpu_packing" not in self.__dict__:
            self.fastpeft_cpu_packing = bitsandbytes.forbid_cpu_packing(self.get_submodule("base_layer"))

    def leave(self) -> None:
        """The modules around this layer and its base, as they were before."""
        if self.fastpeft_watch is not None:
            self.fastpeft_watch.forget([self])
        if self.fastpeft_group is not None:
            self.fastpeft_group.dissolve()
        base = self.get_submodule("base_layer")
        bitsandbytes.allow_cpu_packing(base, self.fastpeft_cpu_packing)
        bitsandbytes.forget(base)
        for name in ("fastpeft_cpu_packing", "fastpeft_calls"):
            self.__dict__.pop(name, None)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        bitsandbytes.forget(self.get_submodule("base_layer"))  # what was read of it keeps the old device's memory
        return super()._apply(*args, **kwargs)

    def _base_changed(self) -> None:
        """PEFT merges through `.data`, which torch does not count as a write; a pending backward must see it."""
        weight = self.get_base_layer().weight  # type: ignore[operator]
        if not weight.is_inference():
            increment_version(weight)


def is_few(x: Any) -> bool:
    """As for each token that is generated; never while torch.compile traces, which would fix the size."""
    return type(x) is Tensor and x.dim() > 1 and few_without_gradients(x) and not torch.compiler.is_compiling()


def why_not_called(layer: nn.Module, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The reason, in the call or the process, why PEFT's own forward must run; or None."""
    if args or any(value is not None for value in kwargs.values()):
        named = ", ".join(sorted(name for name, value in kwargs.items() if value is not None)) or "more arguments"
        return f"called with {named}"
    if type(x) not in (Tensor, nn.Parameter):
        return f"an input of type {type(x).__name__}"
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"an input of {x.dim()} dimensions and dtype {x.dtype}"
    if getattr(layer, "_is_replica", False):
        return "a replica of nn.DataParallel"
    return global_reason()


def together(members: list[tuple[Sibling, Request | str]]) -> list[tuple[Sibling, Request]]:
    """Those that ask for something, in the dtypes of the first with adapters; one without takes any adapters'."""
    found = [(member, request) for member, request in members if not isinstance(request, str)]
    if not found:
        return []
    dtypes = _dtypes([request for _, request in found])
    return [(member, request) for member, request in found if _agrees(request, dtypes)]


def compute(x: Tensor, requests: list[Request]) -> tuple[Tensor, ...]:
    """Run requests whose dtypes agree for one input."""
    projections = [request.projection for request in requests]
    return run_group(x, projections, _dtypes(requests), draw_seeds(x.device, projections, training=True))


def _dtypes(requests: list[Request]) -> Dtypes:
    return next((r.dtypes for r in requests if r.projection.adapters), requests[0].dtypes)


def _agrees(request: Request, dtypes: Dtypes) -> bool:
    own = request.dtypes
    return own == dtypes or (not request.projection.adapters and (own.compute, own.out) == (dtypes.compute, dtypes.out))


def frozen_base(
    base: Any, x: Tensor, autocast: torch.dtype | None
) -> tuple[FrozenWeight, torch.dtype, torch.dtype] | str:
    """(weight, dtype of its product, dtype of the result) of a LoRA layer's base for x, or why it cannot be read."""
    device = x.device
    if bitsandbytes.is_linear_4bit(base):
        reason = why_not_bypassed(base, type(base), device)
        if reason is not None:
            return reason
        frozen = bitsandbytes.frozen_weight(base)
        if isinstance(frozen, str):
            return frozen
        if frozen.device != device:
            return f"a base weight on {frozen.device}, the input on {device}"
        if frozen.shape != (base.out_features, base.in_features):
            return f"a 4-bit weight stored as {frozen.shape}"
        return frozen, autocast or bitsandbytes.compute_dtype(base, x), x.dtype
    reason = why_not_bypassed(base, nn.Linear, device)
    if reason is not None:
        return reason
    weight = base._parameters["weight"]
    reason = peft.why_not_plain(weight, device)
    if reason is not None:
        return f"base layer: {reason}"
    if weight.requires_grad:  # without gradients too: a checkpointed forward and its recomputation draw the same mask
        return "the base weight is trained"
    if autocast is None and weight.dtype != x.dtype:
        return f"input in {x.dtype}, base weight in {weight.dtype}, no autocast"
    dtype = autocast or x.dtype
    return DenseWeight(weight), dtype, dtype


def lora_dtype(adapters: tuple[Any, ...], autocast: torch.dtype | None, default: torch.dtype) -> torch.dtype | str:
    """The dtype in which PEFT would multiply the adapters, or the reason why there is not one."""
    if autocast is not None:
        return autocast
    dtypes = {adapter.a.dtype for adapter in adapters}
    if len(dtypes) > 1:
        return f"adapters in {sorted(map(str, dtypes))}"
    dtype = dtypes.pop() if dtypes else default
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else f"adapters in {dtype}"


@cache
def fast_classes() -> dict[type[nn.Module], type[FastLoraLayer]]:
    """PEFT's layer class -> ours. The 4-bit class is there once PEFT has one (bitsandbytes is installed)."""
    from peft.tuners import lora as stock

    classes: dict[type[nn.Module], type[FastLoraLayer]] = {stock.Linear: _make("FastLinear", stock.Linear)}
    four_bit = getattr(stock, "Linear4bit", None)
    if four_bit is not None:
        classes[four_bit] = _make("FastLinear4bit", four_bit)
    return classes


def _make(name: str, stock: type[nn.Module]) -> type[FastLoraLayer]:
    """Made when PEFT is first needed; a module attribute, so that instances can be pickled."""
    made = type(name, (FastLoraLayer, stock), {"__module__": __name__, "__doc__": f"{stock.__name__} of PEFT, fused."})
    globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    """Unpickling looks the classes up by name."""
    if name in ("FastLinear", "FastLinear4bit"):
        fast_classes()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
