"""Errors that say what would need less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastpeft_kernels.common.exhaustion import is_out_of_memory

from .out_of_memory import LastCall, OutOfMemory


@contextmanager
def explain_out_of_memory(model: nn.Module, *, optimizer: str = "adamw_torch") -> Iterator[None]:
    """Have an error that memory ran out, in anything inside, say what is allocated, what was predicted, and what helps.

        with fastpeft.explain_out_of_memory(model):
            trainer.train()

    Nothing is predicted until the error comes; that takes some seconds, no memory of the GPU, and no random numbers.
    Where nothing can be predicted, as of models without LoRA, the message says why.

    Args:
        model: whose calls are looked at, by a hook that is gone at the end.
        optimizer: what trains it, one of those of `fastpeft.plan`.

    Raises:
        TypeError: `model` is not an nn.Module.
        fastpeft.memory.exhaustion.out_of_memory.OutOfMemory: a torch.OutOfMemoryError, in place of this or of another
            error that says the same ("can't allocate memory", CUBLAS_STATUS_ALLOC_FAILED), which is its `__cause__`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    with LastCall(model) as calls:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise
            from .advice import explained

            raise explained(error, model, calls.seen, optimizer) from error
