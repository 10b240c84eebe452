"""PEFT's LoRA layers with a fused forward: same tree, same parameters, same everything else.

A layer becomes one of these by a swap of `__class__`. Each forward reads the layer's state anew; whatever the op does
not cover runs PEFT's own forward, and the reason is kept for the report.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.lora import Dtypes, LoraAdapter, LoraProjection

from ..integrations import bitsandbytes, dora, peft, quantised
from ..integrations.tuner_layers import why_not_plain
from . import known
from .bypass import why_not_called
from .few_tokens import FEW, FEW_TOKENS, is_few, plain_forward
from .fp8 import ask, products_of
from .head import lazy_logits
from .head_call import LossCalls
from .merges import SeenMerges
from .naming import NamedAsPeft
from .requests import OTHER_ROWS, Request, base_bias, compute, frozen_base, lora_dtype, without_names
from .siblings import RowNames, Sibling
from .watching import SiblingWatch


class FastLoraLayer(NamedAsPeft, SeenMerges, Sibling):
    """Mixed in before a PEFT LoRA layer class; overrides `forward`.

    What else it keeps is in instance attributes of these names; `leave` takes them away again.
    """

    fastpeft_watch: SiblingWatch | None = None
    fastpeft_cpu_packing: bool | None = None
    fastpeft_known: known.Known | None = None  # of the last call
    fastpeft_fp8_left: str | None = None  # why products in FP8 were asked for in vain
    fastpeft_loss: LossCalls | None = None  # of a model's head
    adapted = True
    op_name = "lora_linear"
    over_four_bits = False
    plain_when_few = False  # `plain_forward` knows its class

    def request(self, x: Tensor, row_names: RowNames = None) -> Request | str:
        """What to compute for x, or why PEFT's own forward must run."""
        autocast = autocast_dtype(x.device)
        ordinary = self.plain_when_few and row_names is None and not torch.compiler.is_compiling()
        facts = known.facts(self, x, autocast) if ordinary else None
        if facts is None:
            self.forget_request()
            return self._ask(x, row_names, autocast)
        before: known.Known | None = self.__dict__.get("fastpeft_known")
        if before is not None and before.request is not None and before.facts == facts:
            return before.request
        request = self._ask(x, None, autocast)
        if isinstance(request, str):
            self.forget_request()
        else:
            self.__dict__["fastpeft_known"] = known.Known(facts, request)
        return request

    def _ask(self, x: Tensor, row_names: RowNames, autocast: torch.dtype | None) -> Request | str:
        """The same, made anew."""
        base = self._modules["base_layer"]
        found = frozen_base(base, x, autocast)
        if isinstance(found, str):
            return found
        weight, compute_dtype, out_dtype = found
        bias = base_bias(base)
        reason = why_not_plain(bias, x.device)
        if reason is not None:
            return f"base layer: {reason}"
        if row_names is not None and len(row_names) != x.shape[0]:
            return OTHER_ROWS
        adapters = self.used_adapters(x.device, row_names)
        if isinstance(adapters, str):
            return adapters
        dtype = lora_dtype(adapters, autocast, x.dtype)
        if isinstance(dtype, str):
            return dtype
        dtypes = Dtypes(compute_dtype, dtype, out_dtype)
        in_variant = self.lora_variant and row_names is None
        magnitude = dora.magnitude(self, adapters, dtypes, x.device) if in_variant else None
        if isinstance(magnitude, str):
            return magnitude
        return Request(LoraProjection(weight, bias, adapters, magnitude), dtypes, row_names)

    def used_adapters(self, device: torch.device, row_names: RowNames) -> tuple[LoraAdapter, ...] | str:
        """What the op takes of the layer's adapters, or why PEFT's own forward must run."""
        return peft.used_adapters(self, device, row_names)

    def state(self, x: Tensor, row_names: RowNames = None) -> tuple[Any, ...]:
        layer: Any = self
        adapters, scaling = layer.active_adapters if row_names is None else row_names, layer.scaling
        return (
            *super().state(x, row_names),
            layer._disable_adapters,
            layer.training,
            *layer.merged_adapters,
            *adapters,
            *[scaling.get(name) for name in adapters],
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fastpeft_suspended:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]
        if self.fastpeft_loss is not None and not args and not kwargs and (lazy := lazy_logits(self, x)) is not None:
            self._count("fused")
            return lazy
        row_names = kwargs.get("adapter_names")
        group = self.fastpeft_group
        if not args and not kwargs and is_few(x) and self.leaves_few(x) and (group is None or group.leaves_few(x)):
            self._count(FEW_TOKENS)
            self.__dict__.pop("fastpeft_known", None)  # it may hold memory of a base, or adapters, replaced since
            y = plain_forward(self, x)
            return super().forward(x) if y is None else y  # type: ignore[no-any-return, misc]
        reason = why_not_called(self, x, args, kwargs if row_names is None else without_names(kwargs))
        if reason is None:
            held = None if group is None else group.take(self, x, row_names)
            if held is not None:
                self._count("fused")
                return held
            request = self.request(x, row_names)
            if not isinstance(request, str):
                self._count("fused")
                if group is None:
                    return compute(x, [request])[0]
                return group.compute(self, x, request)
            reason = request
        self._count(reason)
        return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return, misc]

    def leaves_few(self, x: Tensor) -> bool:
        """PEFT's own forward; looking at this layer would take longer.

        Not where something is dropped: under reentrant checkpointing a forward without gradients must draw as ours. Nor
        in the run that finds siblings: the report counts it, as served like the forward with gradients that follows.
        """
        state = self.__dict__  # nn.Module's own look-up takes longer than the rest of this
        watch = state.get("fastpeft_watch")
        if watch is not None and watch.watching:
            return False
        if state["_disable_adapters"] or state["merged_adapters"]:
            return True
        if products_of(state["_modules"]["base_layer"]) is not None:
            return False  # PEFT's products are others
        if self.over_four_bits and x.device.type == "cpu" and x.dtype != torch.float32:
            return False  # our decoding is the faster one
        if state["lora_variant"]:
            return False  # PEFT's DoRA makes two matrices of the weight's size at each call
        if not state["training"]:
            return True
        if x.numel() > FEW * x.shape[-1]:
            return False  # no generation: trainers set what it gives beside a forward with gradients
        dropouts = state["_modules"]["lora_dropout"]._modules.values()
        return not any([dropout.training and type(dropout) is not nn.Identity for dropout in dropouts])

    def base_parameter(self) -> nn.Parameter | None:
        base = self.get_submodule("base_layer")
        return None if quantised.reader(base) is not None else base._parameters.get("weight")

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
        self.ungroup()
        base = self.get_submodule("base_layer")
        bitsandbytes.allow_cpu_packing(base, self.fastpeft_cpu_packing)
        bitsandbytes.forget(base)
        ask(base, None)
        for name in ("fastpeft_cpu_packing", "fastpeft_calls", "fastpeft_fp8_left", "fastpeft_known"):
            self.__dict__.pop(name, None)

    def make_fp8(self) -> None:
        """Make the copies of the base's weight that its products are to take, now and not in the first call."""
        base = self.get_submodule("base_layer")
        if products_of(base) is not None:
            weight = base.get_parameter("weight")
            frozen_base(base, weight.new_empty((0, 0), dtype=torch.float32), torch.float32)

    def forget_request(self) -> None:
        """The last call's, which holds the tensors that it was made of."""
        if not torch.compiler.is_compiling():
            self.__dict__.pop("fastpeft_known", None)

    def delete_adapter(self, adapter_name: str) -> None:
        self.forget_request()
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self.forget_request()
        super().update_layer(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.forget_request()
        return super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        base = self.get_submodule("base_layer")
        bitsandbytes.forget(base)  # what was read of it keeps the old device's memory
        self.forget_request()
        if (products := products_of(base)) is not None:
            products.drop()
        return super()._apply(*args, **kwargs)


_STOCK = {
    "FastLinear": ("layer", "Linear"),
    "FastLinear4bit": ("bnb", "Linear4bit"),
    "FastLinear8bitLt": ("bnb", "Linear8bitLt"),
    "FastTorchaoLoraLinear": ("torchao", "TorchaoLoraLinear"),
    "FastHqqLoraLinear": ("hqq", "HqqLoraLinear"),
    "FastGPTQLoraLinear": ("gptq", "GPTQLoraLinear"),
    "FastAwqLoraLinear": ("awq", "AwqLoraLinear"),
}
"""Our classes, and where PEFT has its own. It has some only where their library is installed."""

VERA = "FastVeraLinear"


@cache
def fast_classes() -> dict[type[nn.Module], type[FastLoraLayer]]:
    """PEFT's layer class -> ours."""
    from peft.import_utils import is_bnb_available

    classes: dict[type[nn.Module], type[FastLoraLayer]] = {}
    for name, (module, stock_name) in _STOCK.items():
        if module == "bnb" and not is_bnb_available():
            continue
        stock = getattr(import_module(f"peft.tuners.lora.{module}"), stock_name, None)
        if stock is not None:
            classes[stock] = _make(name, stock, FastLoraLayer)
    from peft.tuners.vera import Linear

    from .vera import FastVeraLayer

    classes[Linear] = _make(VERA, Linear, FastVeraLayer)
    return classes


def _make(name: str, stock: type[nn.Module], fast: type[FastLoraLayer]) -> type[FastLoraLayer]:
    """Made when PEFT is first needed; a module attribute, so that instances can be pickled."""
    members = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} of PEFT, fused.",
        "over_four_bits": stock.__name__ == "Linear4bit",
        "plain_when_few": fast is FastLoraLayer and stock.__name__ in ("Linear", "Linear4bit"),
    }
    made = type(name, (fast, stock), members)
    globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    """Unpickling looks the classes up by name."""
    if name in (*_STOCK, VERA):
        fast_classes()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
