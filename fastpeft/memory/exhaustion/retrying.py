"""A step of training that ran out of memory is run again, with less kept for backward, as if nothing had happened."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from fastpeft_kernels.common.exhaustion import is_out_of_memory
from fastpeft_kernels.common.remembered import forget_remembered
from fastpeft_kernels.common.scratch import release_scratch
from fastpeft_kernels.weights.held import release_held

from ...applying import RETRIED, SETTINGS
from .before import StateBefore
from .ladder import level_text, next_policy, switch_policy
from .out_of_memory import LastCall, OutOfMemory, phase_of

logger = logging.getLogger("fastpeft")

Result = TypeVar("Result")


class StepRetry:
    """Runs forward and backward of one batch; where memory runs out, again with less kept for backward.

        retry = fastpeft.StepRetry(model)
        for batch in batches:
            loss = retry(lambda: forward_and_backward(batch))
            optimizer.step()

    The failed attempt leaves no trace: its tensors are freed, and random numbers, gradients that were accumulated and
    buffers are what they were. All layers then go from "keep" to "selective", "recompute" and "offload", one after the
    other, for this step and all that follow; since each gives the same bits, so does the training. `report` says it.

    What it costs where nothing fails: a copy of the gradients that are there before the step, in host memory (pinned
    beside a GPU), so none without accumulation; and one of the model's small buffers.

    Args:
        model: accelerated or not; its layers must be ones that transformers' activation checkpointing wraps.
        optimizer: what trains it, for the advice: one of those of `fastpeft.plan`.
        refused: why nothing is to be run again, whatever happens; None if it may be.

    Attributes:
        switches: what layers were switched to, in order.

    Raises:
        TypeError: `model` is not an nn.Module.
    """

    def __init__(self, model: nn.Module, *, optimizer: str = "adamw_torch", refused: str | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.optimizer, self.refused = model, optimizer, refused
        self.switches: list[str] = []
        self._state = StateBefore(model)

    def __call__(self, step: Callable[[], Result], undo: Callable[[], object] | None = None) -> Result:
        """The result of `step()`.

        Args:
            step: forward and backward of one batch, but no step of an optimizer. What it changes beside gradients,
                random numbers and the model's buffers is changed once more in the next attempt.
            undo: puts back what else it changed.

        Raises:
            fastpeft.memory.exhaustion.out_of_memory.OutOfMemory: memory ran out, and there is no policy left that
                keeps less, or a reason not to run the step again, which the message names.
        """
        self._state.note()
        try:
            return self._run(step, undo)
        finally:
            self._state.forget()

    def _run(self, step: Callable[[], Result], undo: Callable[[], object] | None) -> Result:
        while True:
            with LastCall(self.model) as calls:
                try:
                    return step()
                except RuntimeError as error:
                    if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                        raise
                    policy = next_policy(self.model)
                    reason = self.refused or self._why_not(error, calls)
                    if policy is None or reason:
                        from .advice import explained

                        notes = [f"not run again: {reason or 'no policy is left that keeps less'}"]
                        notes += [f"run again before with activations of layers: {level}" for level in self.switches]
                        raise explained(error, self.model, calls.seen, self.optimizer, *notes) from error
            # Here the error is gone, and with it the frames that held the failed attempt's tensors.
            _free(self.model)
            self._state.put_back()
            if undo is not None:
                undo()
            switch_policy(self.model, policy, next(_settings(self.model), None))
            self._tell(level_text(policy))

    def _why_not(self, error: BaseException, calls: LastCall) -> str | None:
        if phase_of(error, calls.seen) == "optimizer step":
            return "the optimizer was at work, and what it had changed is not known"
        return why_not_rerun(self.model) or self._state.why_lost()

    def _tell(self, level: str) -> None:
        self.switches.append(level)
        self.model.__dict__.setdefault(RETRIED, []).append(f"a step was run again, with activations of layers: {level}")
        logger.warning("memory ran out; the step is run again, with activations of layers: %s", level)


def why_not_rerun(model: nn.Module) -> str | None:
    """Why a failed step of a model must not be run again, as far as the model tells."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return f"{distributed.get_world_size()} processes train together, and the others are past this step"
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()):
        return "the model is compiled, and other code may round otherwise"
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(p, name, None) for p in model.parameters() if p.requires_grad for name in hooks):
        return "hooks on parameters' gradients run in backward, and what they had changed is not known"
    return None


def _settings(model: nn.Module) -> Iterator[dict[str, Any]]:
    yield from (module.__dict__[SETTINGS] for module in model.modules() if SETTINGS in module.__dict__)


def _free(model: nn.Module) -> None:
    """What a failed step left behind."""
    release_held()
    forget_remembered()
    release_scratch()
    torch.clear_autocast_cache()  # of casts whose graph is gone
    with torch.inference_mode(False), torch.enable_grad():
        # Nodes that were ready to run wait in this thread's queue of autograd, with all of their graph, for the next.
        torch.zeros((), requires_grad=True).mul(1).backward()
    gc.collect()
    for kind in {p.device.type for p in model.parameters()} - {"cpu", "meta"}:
        home = getattr(torch, kind, None)
        if hasattr(home, "empty_cache"):
            home.empty_cache()  # type: ignore[union-attr]
