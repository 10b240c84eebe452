"""What projections ask of the op for one input, read from their modules; and what is run of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.lora import Dtypes, LoraProjection
from fastpeft_kernels.lora.api import draw_seeds, run
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.weights import DenseWeight, FrozenWeight

from ..integrations import bitsandbytes, peft, quantised
from ..integrations.transformers import is_conv1d, is_own_linear
from ..integrations.tuner_layers import why_not_plain
from .bypass import why_not_bypassed
from .fp8 import products_of

Member = TypeVar("Member")
OTHER_ROWS = "a mixed batch with another number of names than rows"


@dataclass(eq=False, slots=True)
class Request:
    """What a layer asks of the op for one input.

    Attributes:
        row_names: each row's adapter, if the batch is mixed; the same for all that is computed together.
        made: of the first of several: the others, and what was made of them the last time; see `made_before`.
    """

    projection: LoraProjection
    dtypes: Dtypes
    row_names: Sequence[str] | None = None
    made: tuple[Sequence[Request], Any] | None = field(default=None, init=False)


def made_before(requests: Sequence[Request]) -> Any | None:
    """What was made of the very same requests the last time, if anything; while torch.compile traces nothing is."""
    made = None if torch.compiler.is_compiling() else requests[0].made
    if made is None or len(made[0]) != len(requests) - 1:
        return None
    return made[1] if all([a is b for a, b in zip(made[0], requests[1:], strict=True)]) else None


def keep_made(requests: Sequence[Request], made: Any, seeds: Sequence[Tensor | None]) -> None:
    """Have `made_before` give it, unless something was drawn for it."""
    if not torch.compiler.is_compiling() and not any([seed is not None for seed in seeds]):
        requests[0].made = (tuple(requests[1:]), made)


def without_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What else a layer was called with in a mixed batch; while torch.compile traces, all of it is too much."""
    return kwargs if torch.compiler.is_compiling() else {k: v for k, v in kwargs.items() if k != "adapter_names"}


def plain_request(module: Any, x: Tensor) -> Request | str:
    """What a projection without adapters asks of the op for x, or why it must be called itself."""
    autocast = autocast_dtype(x.device)
    found = frozen_base(module, x, autocast)
    if isinstance(found, str):
        return found
    weight, product, out = found
    bias = base_bias(module)
    reason = why_not_plain(bias, x.device)
    if reason is not None:
        return reason
    dtype = lora_dtype((), autocast, product)
    return dtype if isinstance(dtype, str) else Request(LoraProjection(weight, bias, ()), Dtypes(product, dtype, out))


def frozen_base(
    base: Any, x: Tensor, autocast: torch.dtype | None
) -> tuple[FrozenWeight, torch.dtype, torch.dtype] | str:
    """(weight, dtype of its product, dtype of the result) of a LoRA layer's base for x, or why it cannot be read."""
    found = _stored_base(base, x, autocast)
    products = products_of(base)
    if products is None or isinstance(found, str):
        return found
    weight, product, out = found
    return products.weight(weight), product, out


def _stored_base(
    base: Any, x: Tensor, autocast: torch.dtype | None
) -> tuple[FrozenWeight, torch.dtype, torch.dtype] | str:
    """The same with products as the base's library makes them."""
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
    reader = quantised.reader(base)
    if reader is not None:
        return why_not_bypassed(base, type(base), device) or quantised.frozen_base(reader, base, x, autocast)
    turned = is_conv1d(base)
    reason = why_not_bypassed(base, type(base) if turned or is_own_linear(base) else nn.Linear, device)
    if reason is not None:
        return reason
    weight = base._parameters["weight"]
    reason = why_not_plain(weight, device)
    if reason is not None:
        return f"base layer: {reason}"
    if weight.requires_grad:  # without gradients too: a checkpointed forward and its recomputation draw the same mask
        return "the base weight is trained"
    if autocast is None and weight.dtype != x.dtype:
        return f"input in {x.dtype}, base weight in {weight.dtype}, no autocast"
    dtype = autocast or x.dtype
    return DenseWeight(weight.t() if turned else weight), dtype, dtype


def base_bias(base: Any) -> Any:
    """A base layer's bias; some libraries keep it in a buffer or an attribute."""
    parameters = base._parameters
    return parameters["bias"] if "bias" in parameters else getattr(base, "bias", None)


def lora_dtype(adapters: tuple[Any, ...], autocast: torch.dtype | None, default: torch.dtype) -> torch.dtype | str:
    """The dtype in which PEFT would multiply the adapters, or the reason why there is not one."""
    if autocast is not None:
        return autocast
    dtypes = {adapter.a.dtype for adapter in adapters}
    if len(dtypes) > 1:
        return f"adapters in {sorted(map(str, dtypes))}"
    dtype = dtypes.pop() if dtypes else default
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else f"adapters in {dtype}"


def together(members: list[tuple[Member, Request | str]]) -> list[tuple[Member, Request]]:
    """Those that ask for something, in the dtypes of the first with adapters; one without takes any adapters'."""
    found = [(member, request) for member, request in members if not isinstance(request, str)]
    if not found:
        return []
    dtypes = leading_dtypes([request for _, request in found])
    return [(member, request) for member, request in found if agrees(request, dtypes)]


def compute(x: Tensor, requests: list[Request]) -> tuple[Tensor, ...]:
    """Run requests whose dtypes agree for one input."""
    group = made_before(requests)
    if not isinstance(group, Group):
        projections = [request.projection for request in requests]
        seeds = draw_seeds(x.device, projections, training=True)
        row_names = next((request.row_names for request in requests if request.row_names is not None), None)
        index = None if row_names is None else peft.adapter_index(row_names)
        group = Group(projections, leading_dtypes(requests), seeds, adapter_index=index)
        keep_made(requests, group, seeds)
    return run(x, group)


def leading_dtypes(requests: list[Request]) -> Dtypes:
    """Those of the first with adapters."""
    return next((r.dtypes for r in requests if r.projection.adapters), requests[0].dtypes)


def agrees(request: Request, dtypes: Dtypes) -> bool:
    """Whether it can be computed in these; one without adapters takes any adapters'."""
    own = request.dtypes
    return own == dtypes or (not request.projection.adapters and (own.compute, own.out) == (dtypes.compute, dtypes.out))
