"""Does Triton compile and launch on a GPU? It wants a C compiler and Python's headers, and a GPU that it knows."""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl

from .launching import ALWAYS

logger = logging.getLogger("fastpeft")


@triton.jit
def trial_kernel(out_ptr, BLOCK: tl.constexpr):
    """out_ptr (BLOCK,) int32: its own indices."""
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, index)


def launches(index: int) -> bool:
    """Whether a kernel of one program can be launched on CUDA device `index`; a warning says why not."""
    try:
        with torch.cuda.device(index):
            trial_kernel[(1,)](torch.empty(16, dtype=torch.int32, device=f"cuda:{index}"), BLOCK=16, **ALWAYS)
    except Exception as error:  # whatever a compiler, an assembler or a driver says
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("Triton compiles no kernel on cuda:%d, PyTorch serves instead: %s", index, reason[-1])
        return False
    return True
