"""Who computes a loss of given logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import triton_available, triton_serves

BACKENDS = ("auto", "torch", "triton")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def logits_backend(backend: str, *logits: Tensor) -> str:
    """ "torch" or "triton": what "auto" stands for on these logits, or `backend` itself."""
    if backend != "auto":
        return backend
    served = all(x.dtype in _DTYPES for x in logits) and triton_serves(logits[0].device)
    return "triton" if served else "torch"


def check_backend(backend: str, **logits: Tensor) -> None:
    """What was asked for never falls back.

    Raises:
        ValueError: it is none of BACKENDS, or cannot serve these logits here.
        ImportError: it is "triton", which is not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "triton":
        if not triton_available():
            raise ImportError("backend: 'triton' was asked for, but Triton is not installed")
        for name, x in logits.items():
            if x.dtype not in _DTYPES:
                raise ValueError(f"{name}: expected fp32, fp16 or bf16 for 'triton', got {x.dtype}")
