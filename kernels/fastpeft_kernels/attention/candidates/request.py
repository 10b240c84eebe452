"""One call of attention, and what serves it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...common.device import triton_serves
from ..masks import Mask
from ..scores import Scores


class Request(NamedTuple):
    """What `api.attention` was asked for, of valid arguments; the mask's bounds are `masks.bounded`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scores: Scores
    with_lse: bool = False
    deterministic: bool = False

    @property
    def gradients(self) -> bool:
        """Whether q, k or v wants one."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


class NotServedError(RuntimeError):
    """A candidate found out in the call that it cannot serve it; its `refusal` says so from now on."""


def absence_of_triton(device: torch.device) -> str | None:
    """Why what needs Triton on GPUs, and nothing on a CPU, is not to be had on a device."""
    if device.type == "cpu" or triton_serves(device):
        return None
    return f"expected q on a CPU or a GPU that Triton serves, got {device}"


class Candidate(Protocol):
    """An implementation that is not taken untuned.

    Attributes:
        name: of `backend` in `api.attention`.
        beyond_sdpa: whether it may serve what `library.sdpa_refusal` refuses.
    """

    name: str
    beyond_sdpa: bool

    def absence(self, device: torch.device) -> str | None:
        """Why it is not to be had on a device, as one clause; None where it is. May import what it needs."""

    def version(self) -> str:
        """Of its package, where that is not torch; else empty. Only where it is to be had."""

    def refusal(self, request: Request) -> str | None:
        """Why it cannot give the same, as one clause; None when it can. Only where it is to be had."""

    def run(self, request: Request) -> Tensor:
        """(batch, heads, queries, v_features), differentiable, `.transpose(1, 2)` contiguous; where it refuses nothing.

        Raises:
            NotServedError: see there.
        """
