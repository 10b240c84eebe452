"""All candidates by name, and those that a device has."""

from __future__ import annotations

from functools import lru_cache

import torch

from ...common.tracing import as_op
from .compact import Compact
from .flash2 import Flash2
from .flash3 import Flash3
from .flash4 import Flash4
from .flex import Flex
from .request import Candidate, Request
from .sdpa_kernels import SDPA_KERNELS

_ALL: tuple[Candidate, ...] = (*SDPA_KERNELS, Flex(), Compact(), Flash2(), Flash3(), Flash4())
CANDIDATES = {each.name: each for each in _ALL}


@lru_cache
def labels(device: torch.device, beyond_sdpa: bool = False) -> tuple[str, ...]:
    """What choices on a device are written down as: the name, and behind a blank the version of a package of its own.

    A choice for another version is none: it is measured anew.

    Args:
        device: looked at once a process.
        beyond_sdpa: only those that may serve what PyTorch's own does not.
    """
    there = [each for each in _ALL if each.beyond_sdpa or not beyond_sdpa]
    return tuple(f"{each.name} {each.version()}".strip() for each in there if each.absence(device) is None)


def named(label: str) -> str:
    """The candidate's name, or whatever else was chosen."""
    return label.partition(" ")[0]


def refusal(name: str, request: Request) -> str | None:
    """Why the candidate cannot serve, wherever it is called; None when it can."""
    if as_op():
        return "expected a call outside torch.compile and dispatch modes"
    if 0 in (request.q.numel(), request.k.numel(), request.v.numel()):
        return "expected q, k and v with elements"
    if request.with_lse:
        return "expected return_lse=False, got True"
    each = CANDIDATES[name]
    return each.absence(request.q.device) or each.refusal(request)
