"""The head of a language model: with labels in the call above it, its logits are lazy.

A head without adapters becomes a `FastHead` by a swap of `__class__`; an accelerated LoRA layer is asked to be one by
its attribute `fastpeft_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_dtype, autocast_off
from fastpeft_kernels.common.tracing import as_op
from fastpeft_kernels.lora import LoraAdapter
from fastpeft_kernels.weights import FrozenWeight

from ..integrations.accelerate import rebind_hooked_forward
from ..integrations.fsdp import before_sharding
from ..integrations.tuner_layers import why_not_plain
from .bypass import OWN_CLASS, own_class, why_not_bypassed, why_not_called
from .head_call import FEW, HeadCall, LossCalls, few_on_cpu
from .lazy_logits import logits_of
from .mixing import mixed
from .requests import Request, base_bias, plain_request


class FastHead(nn.Module):
    """Mixed in before the class of a projection without adapters."""

    fastpeft_suspended: bool = False
    fastpeft_loss: LossCalls | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and (lazy := lazy_logits(self, args[0])) is not None:
            return lazy
        return super().forward(*args, **kwargs)  # type: ignore[no-any-return, misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (own_class(self),), self.__dict__


def lazy_logits(head: Any, x: Any) -> Tensor | None:
    """The head's logits for x, not made yet; None where its own forward must make them."""
    calls: LossCalls | None = head.fastpeft_loss
    if calls is None or not calls.labelled or head.fastpeft_suspended:
        return None
    if torch.compiler.is_compiling():
        calls.compiled = True
        return None
    watch = getattr(head, "fastpeft_watch", None)
    if watch is not None and watch.watching:  # by a hook of ours, in a run whose result nobody sees
        return None
    read = before_sharding(head)
    call = read if isinstance(read, str) else _call(read, x, calls)
    if isinstance(call, str):
        calls.count(call)
        return None
    return logits_of(call)


def _call(head: Any, x: Any, calls: LossCalls) -> HeadCall | str:
    reason = why_not_called(head, x, (), {}) or why_not_bypassed(head, own_class(head), x.device)
    if reason is not None:
        return reason
    if as_op():
        return "a dispatch mode that records operations"
    if x.shape[-1] != head.in_features:
        return f"an input of {x.shape[-1]} features in place of {head.in_features}"
    if calls.records is None and few_on_cpu(x.numel() // max(1, head.in_features) * int(head.out_features), x):
        return FEW
    if isinstance(head, FastHead):
        trained = head._parameters.get("weight")
        if trained is not None and trained.requires_grad:
            return _trained(head, trained, x, calls)
        request = plain_request(head, x)
    else:
        request = head.request(x)
    return request if isinstance(request, str) else _adapted(request, x, calls)


def _trained(head: Any, weight: nn.Parameter, x: Tensor, calls: LossCalls) -> HeadCall | str:
    autocast, bias = autocast_dtype(x.device), base_bias(head)
    reason = why_not_plain(weight, x.device) or why_not_plain(bias, x.device)
    if reason is not None:
        return reason
    if own_class(head) is not nn.Linear or not weight.is_floating_point():
        return f"a trained {own_class(head).__name__}"
    if autocast is None and weight.dtype != x.dtype:
        return f"input in {x.dtype}, base weight in {weight.dtype}, no autocast"
    dtype = autocast or x.dtype
    return HeadCall(x.to(dtype), weight, bias, None, None, dtype, calls)


def _adapted(request: Request, x: Tensor, calls: LossCalls) -> HeadCall | str:
    """Of a frozen weight, with adapters or without."""
    projection, dtypes = request.projection, request.dtypes
    if projection.magnitude is not None:
        return "DoRA"
    weight: FrozenWeight | Tensor = projection.weight
    bias, s, b = projection.bias, None, None
    with autocast_off(x.device):
        if projection.adapters:
            input_ = x.to(dtypes.lora)
            shares = [_share(adapter, input_) for adapter in projection.adapters]
            ups = [adapter.b.to(dtypes.lora) for adapter in projection.adapters]
            s, b = (shares[0], ups[0]) if len(ups) == 1 else (torch.cat(shares, -1), torch.cat(ups, -1))
        for adapter in projection.adapters:
            if adapter.bias is not None:
                more = adapter.bias * adapter.scaling
                bias = more if bias is None else bias + more
        return HeadCall(x.to(dtypes.compute), weight, bias, s, b, dtypes.out, calls)


def _share(adapter: LoraAdapter, x: Tensor) -> Tensor:
    dropped = F.dropout(x, adapter.dropout) if adapter.dropout else x
    return F.linear(dropped, adapter.a.to(x.dtype)) * adapter.scaling


@contextmanager
def logits_for_a_loss(model: nn.Module) -> Iterator[None]:
    """Within it an accelerated model's heads give lazy logits, as in a call with labels, for a loss of the caller's.

    `F.cross_entropy` of them, with any reduction, is then computed without them; it must be taken within.

    Args:
        model: accelerated, or plain: then nothing is different.
    """
    found = {id(calls): calls for part in model.modules() if (calls := part.__dict__.get("fastpeft_loss"))}
    for calls in found.values():
        calls.labelled += 1
    try:
        yield
    finally:
        for calls in found.values():
            calls.labelled -= 1


def make_head(module: nn.Module) -> None:
    """A projection without adapters becomes a `FastHead`."""
    stock = type(module)
    fast: Any = head_class(stock)
    module.__class__ = fast
    rebind_hooked_forward(module, stock, fast)


def unmake_head(module: nn.Module) -> None:
    """What it was before, if it was made a head."""
    module.__dict__.pop("fastpeft_loss", None)
    if not isinstance(module, FastHead):
        return
    fast: type[nn.Module] = type(module)
    stock = own_class(module)
    if fast is stock:  # FSDP2 has put a class of its own before ours
        module.fastpeft_suspended = True
        return
    module.__dict__.pop("fastpeft_suspended", None)
    module.__class__ = stock  # type: ignore[assignment]
    rebind_hooked_forward(module, fast, stock)


def head_class(stock: type[nn.Module]) -> type[nn.Module]:
    """Ours for a class of projections."""
    made = mixed(FastHead, stock)
    OWN_CLASS[made] = stock
    return made


def _blank(stock: type[nn.Module]) -> nn.Module:
    made = head_class(stock)
    return made.__new__(made)


def own_heads(root: nn.Module) -> Iterator[tuple[str, FastHead]]:
    """(path, head) of those without adapters."""
    yield from ((path, module) for path, module in root.named_modules() if isinstance(module, FastHead))
