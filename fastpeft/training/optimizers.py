"""Which optimizer a run is trained with: one of transformers' names, or ours."""

from __future__ import annotations

from typing import Any

from fastpeft.errors import UserError

OURS = "fastpeft_adamw"
TRIED = 4096
"""Elements of the parameter that an optimizer is tried on: from so many on bitsandbytes keeps its state in 8 bits."""


def name_for_trainer(name: str) -> str:
    """What transformers' arguments call it; for ours, what has the same numbers."""
    return "adamw_torch_fused" if name == OURS else name


def chosen_optimizer(name: str, arguments: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    """The class, or what makes one, and its options; tried where that can be, on a parameter of its own.

    Some come with packages of their own, or do not run on every device, and say so only at the first step. It is to be
    asked for before a trainer is built, which makes the run's folder.

    Args:
        name: `training.optim`.
        arguments: the trainer's.

    Raises:
        UserError: it is not installed, refuses its options, or does not run here.
    """
    import torch
    from transformers import Trainer

    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if name == OURS:
            from fastpeft.optim import AdamW

            options.pop("fused")
            kind = AdamW
        if kind.__module__.startswith(("torch.optim.", "bitsandbytes.optim.", "fastpeft.")):
            # others want more than a number to train
            parameter = torch.zeros(TRIED, device=arguments.device, requires_grad=True)
            parameter.grad = torch.zeros_like(parameter)
            kind([parameter], **options).step()
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"training.optim: {name}: {error}") from error
    return kind, options


def set_optimizer(trainer: Any, name: str, chosen: tuple[Any, dict[str, Any]]) -> None:
    """Have a trainer of transformers' kind, just built, train with what `chosen_optimizer` gave.

    Gradients then lie where several processes add them up (DDP's buckets), and not in the parameters as well.
    """
    if name == OURS:
        trainer.optimizer_cls_and_kwargs = chosen
    if trainer.accelerator.ddp_handler is not None:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
