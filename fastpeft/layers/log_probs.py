"""Log-probabilities of labels for TRL's trainers, by the fused loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastpeft_kernels.common.device import autocast_dtype
from fastpeft_kernels.common.tracing import as_op
from fastpeft_kernels.loss import Head, linear_cross_entropy

from ..integrations import trl
from ..integrations.trl import LogProbs, LogProbsCall, Theirs
from ..integrations.tuner_layers import why_not_plain
from .head_call import FEW, LossCalls, few_on_cpu

THEIRS = "TRL: "
"""Begins outcomes of calls that TRL's own function served."""
WRAPPED = "its forward is another, or wrapped"
_SERVED = {"log_probs", "entropy", "mean_logits", "is_top1"}


class TrlHeads:
    """A hook on what is around a model: TRL binds its forward to the model when a trainer is made, before or after us.

    Attributes:
        calls: of the model.
    """

    def __init__(self, calls: LossCalls) -> None:
        self.calls = calls

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if not kwargs.get("fused_lm_head") or torch.compiler.is_compiling():
            return
        for each in (module, module._modules.get("model")):  # PEFT calls the latter's forward past its hooks
            if each is not None and each.__dict__.get("fastpeft_loss") is self.calls and not trl.bind(each, log_probs):
                self.calls.count(THEIRS + WRAPPED)


def log_probs(model: nn.Module, call: LogProbsCall, theirs: Theirs) -> LogProbs | None:
    """What TRL's function computes; None where it must itself."""
    calls: LossCalls | None = model.__dict__.get("fastpeft_loss")
    if calls is None:
        return None
    if (reason := _why_not(call, calls)) is not None:
        calls.count(THEIRS + reason)
        return None
    head = Head(call.weight, call.bias, scale=call.logit_scale / call.temperature, softcap=call.final_logit_softcapping)
    found = linear_cross_entropy(  # the entropy in any case: with it sums are in another order
        call.hidden, head, call.targets, reduction="none", log_probs=True, entropy=True,
        correct="is_top1" in call.outputs, mean_logits="mean_logits" in call.outputs,
    )  # fmt: skip
    calls.served()
    entropy = found.entropy if "entropy" in call.outputs else None
    if entropy is not None and torch.is_grad_enabled():
        again = _Again(theirs, call._replace(outputs=("entropy",)), calls)
        entropy = _Entropy.apply(entropy, again, call.hidden, call.weight, call.bias)
    assert found.log_probs is not None
    return LogProbs(found.log_probs, entropy, None, found.mean_logits, found.correct)


def _why_not(call: LogProbsCall, calls: LossCalls) -> str | None:
    """Why TRL's function must compute what is asked for."""
    hidden, weight, cap = call.hidden, call.weight, call.final_logit_softcapping
    apart = any(why_not_plain(each, hidden.device) for each in (hidden, weight, call.bias))
    if apart or not weight.is_floating_point():
        return "a head in parts or of a type of its own"
    if as_op():
        return "a dispatch mode that records operations"
    if hidden.dtype == torch.float64 or call.targets.dtype != torch.int64:
        return f"hidden states in {hidden.dtype}, labels in {call.targets.dtype}"
    if not isinstance(call.temperature, (int, float)) or cap == 0 or (cap is not None and call.temperature != 1):
        return f"a temperature of {call.temperature} after a soft cap of {cap}"
    if not _SERVED.issuperset(call.outputs):
        return f"asked for {', '.join(sorted({*call.outputs} - _SERVED))}"
    if calls.entropy_is_trained and "entropy" in call.outputs and torch.is_grad_enabled():
        return "the entropy has a gradient"
    return FEW if few_on_cpu(hidden.shape[0] * weight.shape[0], hidden) else None


class _Again(NamedTuple):
    """What TRL's function is asked for where the entropy does have a gradient."""

    theirs: Theirs
    call: LogProbsCall
    calls: LossCalls


class _Entropy(torch.autograd.Function):
    """The entropy, whose gradient hardly anybody asks for: TRL's function computes it again then, later calls whole."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, again: _Again, *inputs: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.theirs, call, ctx.calls = again
        ctx.rest = call._replace(hidden=None, weight=None, bias=None, targets=None)  # type: ignore[arg-type]
        ctx.autocast = autocast_dtype(call.hidden.device)
        ctx.save_for_backward(*inputs, call.targets)
        return entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[2:]
        if d_entropy is None:
            return (None,) * 5
        ctx.calls.entropy_is_trained = True
        *inputs, targets = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(flag) for t, flag in zip(inputs, needed, strict=True)
            ]
            hidden, weight, bias = leaves
            with torch.autocast(targets.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None):
                call = ctx.rest._replace(hidden=hidden, weight=weight, bias=bias, targets=targets)
                (_, entropy, *_rest) = ctx.theirs(*call)
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad(entropy, wanted, d_entropy))
        return None, None, *(next(found) if flag else None for flag in needed)
