"""Does something watch the operations that run, so that ours must be operations too?"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def as_op() -> bool:
    """True under torch.compile and under dispatch modes (selective checkpointing, fake tensors, FLOP counters)."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
