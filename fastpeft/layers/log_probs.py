"""Log-probabilities of labels for TRL's trainers, by the fused loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastpeft_kernels.common.tracing import as_op
from fastpeft_kernels.loss import Head, linear_cross_entropy

from ..integrations import trl
from ..integrations.trl import LogProbs, LogProbsCall, Theirs
from .head_call import LossCalls, few_on_cpu

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
        for each in (module, getattr(module, "model", None)):  # PEFT calls the latter's forward past its hooks
            if isinstance(each, nn.Module) and each.__dict__.get("fastpeft_loss") is self.calls:
                trl.bind(each, log_probs)


def log_probs(model: nn.Module, call: LogProbsCall, theirs: Theirs) -> LogProbs | None:
    """What TRL's function computes; None where it must itself."""
    calls: LossCalls | None = model.__dict__.get("fastpeft_loss")
    if calls is None or not _served(call):
        return None
    calls.served()
    head = Head(call.weight, call.bias, scale=call.logit_scale / call.temperature, softcap=call.final_logit_softcapping)
    found = linear_cross_entropy(
        call.hidden, head, call.targets, reduction="none", log_probs=True,
        entropy="entropy" in call.outputs, correct="is_top1" in call.outputs, mean_logits="mean_logits" in call.outputs,
    )  # fmt: skip
    entropy = found.entropy
    if entropy is not None and torch.is_grad_enabled():
        again = (theirs, call._replace(outputs=("entropy",)))
        entropy = _Entropy.apply(entropy, again, call.hidden, call.weight, call.bias)
    assert found.log_probs is not None
    return LogProbs(found.log_probs, entropy, None, found.mean_logits, found.correct)


def _served(call: LogProbsCall) -> bool:
    hidden, weight, words = call.hidden, call.weight, call.weight.shape[0]
    plain = all(type(each) in (Tensor, nn.Parameter) for each in (hidden, weight, call.bias) if each is not None)
    if not plain or hasattr(weight, "ds_id") or as_op():  # DeepSpeed's parts, which only TRL gathers in backward
        return False
    if call.final_logit_softcapping is not None and call.temperature != 1.0:
        return False
    if hidden.dtype == torch.float64 or not weight.is_floating_point():  # TRL's are in fp32 all the same
        return False
    return _SERVED.issuperset(call.outputs) and not few_on_cpu(hidden.shape[0] * words, hidden)


class _Entropy(torch.autograd.Function):
    """The entropy, whose gradient hardly anybody asks for: TRL's function computes both again then."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, again: tuple[Theirs, LogProbsCall], *inputs: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        theirs, call = again
        ctx.theirs, ctx.rest = theirs, call._replace(hidden=None, weight=None, bias=None, targets=None)  # type: ignore[arg-type]
        device = call.hidden.device.type
        ctx.autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        ctx.save_for_backward(*inputs, call.targets)
        return entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[2:]
        if d_entropy is None:
            return (None,) * 5
        *inputs, targets = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(flag) for t, flag in zip(inputs, needed, strict=True)
            ]
            hidden, weight, bias = leaves
            device = targets.device.type
            with torch.autocast(device, dtype=ctx.autocast or None, enabled=bool(ctx.autocast)):
                call = ctx.rest._replace(hidden=hidden, weight=weight, bias=bias, targets=targets)
                (_, entropy, *_rest) = ctx.theirs(*call)
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(torch.autograd.grad(entropy, wanted, d_entropy))
        return None, None, *(next(found) if flag else None for flag in needed)
