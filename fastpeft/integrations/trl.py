"""What fastpeft knows of TRL: how its trainers have a model compute log-probabilities of labels without logits.

`add_fused_lm_head` of TRL binds a forward to a causal model that, called with `fused_lm_head=True`, hands hidden states
and the head's weight to an autograd function, a name of TRL's module. `bind` gives one model a copy of that forward's
own code, which finds another function under the name. Written for TRL 1.15 and 1.16; forwards that look otherwise are
left alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_HOME, _FORWARD, _NAME = "trl.trainer.utils", "_fused_forward", "_ChunkedLogProbFunction"
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class LogProbsCall(NamedTuple):
    """What TRL's function is given.

    Attributes:
        hidden: (tokens, hidden_size).
        weight, bias: (words, hidden_size) and (words,) or None, the head's.
        targets: (tokens,) int64, each in [0, words).
        temperature: divides the logits, after the cap.
        chunk_size: of words, TRL's own.
        final_logit_softcapping: bound of the logits, or None.
        logit_scale: factor of the logits before the cap.
        outputs: what is wanted beside the log-probabilities.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float
    chunk_size: int
    final_logit_softcapping: float | None
    logit_scale: float
    outputs: tuple[str, ...]


class LogProbs(NamedTuple):
    """What TRL's function returns, (tokens,) each; all but the first None where they are not wanted.

    log_probs and entropy are differentiable in hidden, weight and bias.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


_running: ContextVar[nn.Module] = ContextVar("fastpeft_trl_model")
"""Whose forward it is: copies of a model share the forward's function with it."""

Theirs = Callable[..., tuple[Tensor | None, ...]]
Serve = Callable[[nn.Module, LogProbsCall, Theirs], LogProbs | None]


def bind(model: nn.Module, serve: Serve) -> bool:
    """Have `serve` compute the log-probabilities of a model to which TRL has bound a forward, as it has it.

    What that forward reads of its module is as it is now.

    Args:
        serve: called with the model, the call, and TRL's function for its arguments; returns None where that must.

    Returns:
        Whether it does now.
    """
    theirs = getattr(model.__dict__.get("forward"), "__func__", None)
    if not isinstance(theirs, FunctionType):
        return False
    if _is_known(theirs):
        model.forward = MethodType(_copy(theirs, serve), model)
        return True
    return _is_ours(inspect.unwrap(theirs, stop=_is_ours))  # accelerate wraps it when a training begins


def unbind(model: nn.Module) -> None:
    """TRL's own forward again."""
    forward = model.__dict__.get("forward")
    theirs = getattr(getattr(forward, "__func__", None), "fastpeft_theirs", None)
    if theirs is not None:
        model.forward = MethodType(theirs, model)


def _is_ours(forward: Callable[..., Any]) -> bool:
    return hasattr(forward, "fastpeft_theirs")


def _is_known(forward: FunctionType) -> bool:
    names, function = forward.__globals__, forward.__globals__.get(_NAME)
    if forward.__code__.co_name != _FORWARD or names.get("__name__") != _HOME or not isinstance(function, type):
        return False
    given = list(inspect.signature(function.forward).parameters)  # type: ignore[attr-defined]
    outputs = getattr(sys.modules.get(function.__module__), "OPTIONAL_OUTPUTS", None)
    return given == ["ctx", *LogProbsCall._fields] and outputs == _OUTPUTS


def _copy(theirs: FunctionType, serve: Serve) -> FunctionType:
    function = _Function(theirs.__globals__[_NAME], serve)
    names = {**theirs.__globals__, _NAME: function}
    copied = FunctionType(theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    copied.__kwdefaults__ = theirs.__kwdefaults__

    @functools.wraps(theirs)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return theirs(self, *args, **kwargs)
        outer = _running.set(self)
        try:
            return copied(self, *args, **kwargs)
        finally:
            _running.reset(outer)

    forward.fastpeft_theirs = theirs  # type: ignore[attr-defined]
    return forward  # type: ignore[return-value]


class _Function:
    """Stands where TRL's forward expects its autograd function."""

    def __init__(self, theirs: Any, serve: Serve) -> None:
        self.theirs, self.serve = theirs, serve

    def apply(self, *args: Any) -> tuple[Tensor | None, ...]:
        found = self.serve(_running.get(), LogProbsCall(*args), self.theirs.apply)
        return self.theirs.apply(*args) if found is None else found
