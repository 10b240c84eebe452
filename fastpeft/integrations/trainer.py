"""transformers' Trainer, and TRL's, whose failed steps are run again."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ..memory.exhaustion.retrying import StepRetry

logger = logging.getLogger("fastpeft")

Trainer = TypeVar("Trainer")


def retry_steps(trainer: Trainer) -> Trainer:
    """Have a Trainer's failed steps run again as by `StepRetry`: where memory runs out, with less kept for backward.

        trainer = fastpeft.retry_steps(Trainer(model, ...))

    Losses, gradients and what the trainer logs are those of a training in which nothing failed. Numbers that the
    trainer itself counts in a step (TRL's metrics) are put back before it is run again. Wraps `training_step` of this
    instance; `del trainer.training_step` undoes it. Evaluation and the optimizer's own step are not run again; have
    their errors explained by `with fastpeft.explain_out_of_memory(model): trainer.train()`.

    Where a step cannot be run again as it was, it is not, and a warning says why at once: several processes or
    devices, torch.compile, TRL's trainers that generate in a step, and its activation_offloading.

    Returns:
        The same trainer.

    Raises:
        TypeError: it has no `training_step`, or no model.
    """
    given: Any = trainer
    if not callable(getattr(given, "training_step", None)) or getattr(given, "model", None) is None:
        raise TypeError(f"trainer: expected a Trainer of transformers with a model, got {type(trainer).__name__}")
    reason = why_not_retried(given)
    if reason:
        logger.warning("steps that run out of memory are not run again: %s", reason)
    step: Callable[..., Any] = given.training_step
    retries: list[StepRetry] = []

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not retries or retries[0].model is not given.model:
            retries[:] = [StepRetry(given.model, optimizer=_optimizer(given), refused=reason)]
        undo = _undo(given, inputs)
        return retries[0](lambda: step(model, inputs, *args, **kwargs), undo)

    given.training_step = training_step
    return trainer


def why_not_retried(trainer: Any) -> str | None:
    """Why a trainer's failed steps must not be run again; None where they may be."""
    arguments = trainer.args
    if arguments.world_size > 1:
        return f"{arguments.world_size} processes train together, and the others would be past the step"
    kind = getattr(getattr(trainer, "accelerator", None), "distributed_type", "NO")
    if str(getattr(kind, "value", kind)) != "NO":
        return f"accelerate prepared the model for {getattr(kind, 'value', kind)}"
    if arguments.n_gpu > 1:
        return "the model is copied to several GPUs in each step (DataParallel)"
    if arguments.torch_compile:
        return "the model is compiled, and other code may round otherwise"
    if getattr(arguments, "activation_offloading", False):
        return 'activation_offloading of TRL keeps tensors of a failed step; LayerPolicy("offload") does the same'
    if _makes_its_inputs(trainer):
        return f"{type(trainer).__name__} makes what it trains on within a step"
    return None


def _makes_its_inputs(trainer: Any) -> bool:
    home: Any = sys.modules.get("transformers.trainer")
    ours = getattr(type(trainer), "_prepare_inputs", None)
    return home is not None and ours is not None and ours is not home.Trainer._prepare_inputs


def _optimizer(trainer: Any) -> str:
    name = trainer.args.optim
    return str(getattr(name, "value", name))


def _undo(trainer: Any, inputs: Any) -> Callable[[], None]:
    """Puts back the trainer's own counts, and what its inputs are called."""
    counts = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value)}
    before = dict(inputs) if hasattr(inputs, "keys") else None

    def undo() -> None:
        vars(trainer).update(copy.deepcopy(counts))
        if before is not None:
            for name in set(inputs) - set(before):
                del inputs[name]
            inputs.update(before)

    return undo


def _is_plain(value: Any) -> bool:
    """A number, or containers of numbers and words."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
