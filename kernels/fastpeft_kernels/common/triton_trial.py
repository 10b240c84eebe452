"""Does Triton compile and launch on a GPU? It wants a C compiler and Python's headers, and a GPU that it knows."""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl

logger = logging.getLogger("fastpeft")


@triton.jit
def trial_kernel(out_ptr, BLOCK: tl.constexpr):
    """out_ptr (BLOCK,) int32: its own indices."""
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, index)


def launches(index: int) -> bool:
    """Whether a kernel of one program can be launched on CUDA device `index`, by Triton and as what it compiled before;
    a warning says why not.
    """
    try:
        from .launching import Launcher  # of parts of Triton that another version may not have

        with torch.cuda.device(index):
            out, launch = torch.empty(16, dtype=torch.int32, device=f"cuda:{index}"), Launcher(trial_kernel)
            for _ in range(2):
                launch(out.device, (1,), out, BLOCK=16)
    except Exception as error:  # whatever a compiler, an assembler or a driver says
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logger.warning("Triton compiles no kernel on cuda:%d, PyTorch serves instead: %s", index, reason[-1])
        return False
    return True
