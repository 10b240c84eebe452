"""torch's allocator on a GPU, where memory is short."""

from __future__ import annotations

import os
import sys
from functools import cache

import torch

_GROWING = "expandable_segments"


@cache
def grow_segments() -> None:
    """Have torch take GPU memory in segments that grow, for this process from now on.

    Its segments have fixed sizes otherwise: what was freed in one size does not serve another, and a step that is near
    the limit fails with a tenth of the memory reserved and unused. Nothing is changed where the user has decided
    (`expandable_segments` in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF), on systems that have no such segments,
    and without a GPU.
    """
    if sys.platform == "win32" or not torch.cuda.is_available() or torch.cuda.get_allocator_backend() != "native":
        return
    chosen = [os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if os.environ.get(name)]
    if any(_GROWING in each for each in chosen):
        return
    apply = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    apply(",".join([*chosen[:1], f"{_GROWING}:True"]))  # the others return to their defaults otherwise
