"""For other losses over a vocabulary than the model's own: a call's hidden states and head, in place of its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastpeft_kernels.loss import Head

from .head_call import LossCalls
from .lazy_logits import LazyLogits


@contextmanager
def lazily(model: nn.Module) -> Iterator[None]:
    """Calls of an accelerated model give lazy logits without labels too, as far as they do with labels."""
    found = (module.__dict__.get("fastpeft_loss") for module in model.modules())
    calls = {id(each): each for each in found if isinstance(each, LossCalls)}.values()
    for each in calls:
        each.labelled += 1
    try:
        yield
    finally:
        for each in calls:
            each.labelled -= 1


def parts_of(logits: Tensor) -> tuple[Tensor, Head] | None:
    """What logits (..., words) would be made of: hidden states (..., hidden_size) and the head, both differentiable.

    Logits that were sliced by rows, viewed, cast, scaled, capped or got a bias since are followed.

    Returns:
        None for logits that are there already, and for those of which only they themselves can tell.

    Raises:
        RuntimeError: the head is no longer what it was when it was called.
    """
    if type(logits) is not LazyLogits or not logits.family.lazy or logits.family.watched or not logits.trail.serves:
        return None
    if logits.family.announced:  # what is computed from the parts would have to be announced
        return None
    if not all(added.unchanged for added in logits.trail.biases):
        return None
    family = logits.family
    family.call.check_unchanged()
    with torch._C.DisableTorchFunctionSubclass():
        found = family.call.parts(logits.trail)
    if not family.served:
        family.served = True
        family.call.calls.served()
    return found
