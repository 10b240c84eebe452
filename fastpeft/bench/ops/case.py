"""What the benchmark of an op is made of: cases that state their floor, and peers that all compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")


@dataclass(frozen=True)
class Floor:
    """What no implementation can do without.

    Attributes:
        flops: operations of the matrix products of the definition; 0 for an op of pure memory traffic.
        bytes: each operand read once, each result written once.
    """

    flops: float
    bytes: float


@dataclass
class Inputs:
    """One set of tensors of a case, the same for every peer.

    Attributes:
        tensors: by name, in the case's dtype (and integer ones), on the device.
        wanted: what gradients are taken of; all of them require one. Empty: the op has no backward.
        dys: gradient of each output; a scalar loss has `torch.ones(())`.
        extra: whatever else the peers need, such as a quantised weight.
    """

    tensors: dict[str, Tensor]
    wanted: tuple[Tensor, ...] = ()
    dys: tuple[Tensor, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


Forward = Callable[[], Sequence[Tensor]]
"""Computes the outputs of a case; each call starts afresh and may be differentiated once."""
Peer = Callable[[Inputs], Forward]
"""Makes what computes a case. Raises NotHereError, with the reason, where it cannot run."""


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    Attributes:
        op: name of the op, as its folder has it.
        name: the case in words that are stable across runs: the model whose shape it is, sizes, what is trained.
        dtype: of the inputs.
        make: (device, dtype, seed) to fresh random inputs. Called with float64 for the oracle: then what has no
            float64 form (a quantised weight) is decoded exactly. One seed gives the same numbers in every dtype, up to
            the rounding to `dtype`, which the float64 ones must share.
        floors: by direction; those that are missing are not measured.
        reference: plain PyTorch, in any dtype; the oracle in float64 and the peer "torch" in the case's dtype, whose
            error sets the budget.
        peers: by name, "fastpeft" first; further names as in `fastpeft.bench.records`. "torch" is `reference` and
            not among them.
        settings: what else defines the case, for tables and plots: {"model": ..., "tokens": ..., "rank": ...}.
    """

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[str, torch.dtype, int], Inputs]
    floors: Mapping[Direction, Floor]
    reference: Peer
    peers: Mapping[str, Peer]
    settings: Mapping[str, Any] = field(default_factory=dict)
