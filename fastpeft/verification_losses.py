"""Losses from hidden states, held against the same from logits, in the model's dtype and in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft_kernels.common.device import autocast_off

from .layers.head_call import Recorded
from .verification_modules import Check


@contextmanager
def recorded_losses(heads: Mapping[str, nn.Module]) -> Iterator[list[Recorded]]:
    """What losses are computed from meanwhile."""
    records: list[Recorded] = []
    calls = [head.__dict__["fastpeft_loss"] for head in heads.values() if "fastpeft_loss" in head.__dict__]
    for each in calls:
        each.records = records
    try:
        yield records
    finally:
        for each in calls:
            each.records = None


def check_losses(records: list[Recorded]) -> tuple[list[Check], dict[str, float]]:
    """Checks of each loss and its gradient of the hidden states, and PEFT's own relative errors in the two."""
    checks: list[Check] = []
    worst = {"loss": 0.0, "gradient": 0.0}
    for record in records:
        options = {name: value for name, value in record.options.items() if name != "class_weight"}
        options["weight"] = record.options.get("class_weight")
        ours = _differentiated(record, record.again)
        peft = _differentiated(record, partial(_from_logits, record, options))
        exact = _differentiated(record, partial(_from_logits, record, options, wide=True))
        for what, mine, theirs, truth in zip(worst, ours, peft, exact, strict=True):
            error, reference = _error(mine, truth), _error(theirs, truth)
            eps = torch.finfo(mine.dtype).eps  # a loss of 16-bit logits, as T5's, is of 16 bits itself
            checks.append(Check("", f"{what} of hidden states", error, reference, 2 * reference + 2 * eps))
            worst[what] = max(worst[what], reference)
    return checks, worst


@contextmanager
def noisy_gradients(heads: Mapping[str, nn.Module], relative: float, seed: int) -> Iterator[None]:
    """Gradients of heads' inputs with gaussian noise added, so large beside their norm."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(gradient: Tensor) -> Tensor:
        noise = torch.randn(gradient.shape, generator=generator).to(gradient)
        return gradient + noise * (relative * gradient.norm() / max(1, gradient.numel()) ** 0.5)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad:
            args[0].register_hook(disturb)

    handles = [head.register_forward_pre_hook(hook) for head in heads.values()] if relative else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _differentiated(record: Recorded, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        hidden = record.call.hidden.detach().requires_grad_()
        value = loss(hidden).sum()
        (gradient,) = torch.autograd.grad(value, hidden)
    return value.detach(), gradient


def _from_logits(record: Recorded, options: dict[str, Any], hidden: Tensor, wide: bool = False) -> Tensor:
    """As the model's own code computes it; in fp64 throughout if `wide`."""
    call, trail = record.call, record.trail

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach().to(torch.float64 if wide else dtype)

    with autocast_off(call.device):
        x = hidden.double() if wide else hidden
        z = F.linear(x, cast(call.values(hidden.dtype), hidden.dtype))
        if call.s is not None and call.b is not None:
            z = z + F.linear(cast(call.s, call.s.dtype), cast(call.b, call.s.dtype))
        z = z if wide else z.to(call.out)
        for bias in (call.bias, *(added.values for added in trail.biases)):
            z = z if bias is None else z + cast(bias.reshape(-1), z.dtype)
        z = z * trail.scale
        z = torch.tanh(z) * trail.after if trail.tanh else z
        z = trail.rows_of(z)
        weight = options["weight"]
        z = z if wide else z.to(torch.promote_types(trail.like.dtype, torch.float32))
        return F.cross_entropy(z, record.labels, **options | {"weight": None if weight is None else weight.to(z.dtype)})


def _error(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth.double()).norm().item() / (truth.double().norm().item() or 1.0)
