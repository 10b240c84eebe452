"""Other ways to the loss of a head, for comparison: mean cross-entropy of hidden (tokens, features) under a weight.

Optional packages are looked for when a peer is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 1024  # tokens


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), labels)


@cache
def _compiled_plain() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_plain)


def _compiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _compiled_plain()(hidden, weight, labels)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A checkpoint for each chunk of tokens."""

    def part(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((x @ weight.t()).float(), y, reduction="sum")

    parts = zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True)
    sums = [checkpoint(part, x, y, use_reentrant=False) for x, y in parts]
    return torch.stack(sums).sum() / labels.numel()


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)
    return found[0] if isinstance(found, tuple) else found


def _cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = import_module("cut_cross_entropy").linear_cross_entropy(hidden, weight, labels)
    return loss


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Liger": _liger,
    "chunked PyTorch": _chunked,
    "PyTorch": _plain,
    "compiled PyTorch": _compiled,
    "Cut Cross-Entropy": _cut,
}
