"""Whether a loss depends on what the model reads: other inputs with the same labels should give another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.memory.exhaustion.retrying import why_not_rerun

from .batches import IGNORED
from .origin import Call, as_before, loss_of

TRIALS = (10, 20, 40)
"""Steps after which it is tried. All must fail: a head of zeros gives every input the same until it has learned."""
TRIES = 30
"""Batches that are looked at for rows that can be compared."""
TOKENS = 64
"""Of two rows: what is tried takes next to no memory or time."""
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Dependence:
    """Compares, at some steps of a training, the losses of two rows and of the same rows with their inputs swapped.

    Attributes:
        found: whether all trials gave the same loss twice.
    """

    def __init__(self) -> None:
        self._left, self._tries = list(TRIALS), 0
        self.found = False

    def due(self, step: int) -> bool:
        """Whether to try in this step, or the first after it with rows that can be compared."""
        return bool(self._left) and step >= self._left[0]

    def try_it(self, model: nn.Module, call: Call) -> None:
        """Two calls of the model without gradients, after which it is as before."""
        self._tries += 1
        pair = swapped(call)
        if pair is None and self._tries < TRIES:
            return
        if pair is None or why_not_rerun(model) is not None:
            self._left.clear()
            return
        try:
            with as_before(model):
                first = _told(model, pair[0])
            with as_before(model):
                second = _told(model, pair[1])
        except Exception:  # a model that takes other rows only: the training counts
            self._left.clear()
            return
        if first is None or second is None or not torch.equal(first, second) or not first.isfinite().all():
            self._left.clear()
            return
        del self._left[0]
        self.found = not self._left


def _told(model: nn.Module, call: Call) -> Tensor | None:
    """The loss; in few bits, in which other losses may be rounded to the same, with what it was computed from."""
    with torch.no_grad():
        output = model(*call.args, **call.kwargs)
    loss = loss_of(output)
    if loss is None or loss.dtype.itemsize >= 4:
        return loss
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return torch.cat([loss.flatten(), logits.flatten()]) if isinstance(logits, Tensor) else None


def swapped(call: Call) -> tuple[Call, Call] | None:
    """Two rows of a call, and the same with one's input beside the other's labels; None where that says nothing."""
    kwargs = call.kwargs
    ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
    tensors = {name for name, value in kwargs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if call.args or not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return None
    if tensors - {*_BY_TOKEN, "labels", "decoder_input_ids", "decoder_attention_mask"}:
        return None
    if ids.dim() != 2 or labels.dim() == 0 or len(ids) < 2 or len(labels) != len(ids):
        return None
    if any(kwargs[name].shape != ids.shape for name in tensors & set(_BY_TOKEN)):
        return None
    begin = _learned_from(labels) if labels.shape == ids.shape else 0
    window = slice(begin, begin + TOKENS)
    read = {name: kwargs[name][:2, window] for name in tensors & set(_BY_TOKEN)}
    target = kwargs["labels"][:2, window] if labels.shape == ids.shape else labels[:2]
    same = torch.equal(read["input_ids"][0], read["input_ids"][1]) or torch.equal(target[0], target[1])
    if same or not _has_labels(target) or not _is_read(read.get("attention_mask")):
        return None
    given = {**kwargs, **read, "labels": target}
    given |= {name: kwargs[name][:2] for name in tensors if name.startswith("decoder_")}
    flipped: dict[str, Any] = {name: value.flip(0) for name, value in read.items()}
    return Call((), given), Call((), given | flipped)


def _learned_from(labels: Tensor) -> int:
    """The first place at which something is learned, with the one before it, from which it is told."""
    places = (labels[:2] != IGNORED).any(0).nonzero()
    return max(0, int(places[0]) - 1) if len(places) else 0


def _has_labels(labels: Tensor) -> bool:
    return labels.is_floating_point() or bool((labels != IGNORED).any())


def _is_read(mask: Tensor | None) -> bool:
    return mask is None or bool(mask.any(1).all())
