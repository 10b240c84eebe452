"""Times on a CUDA GPU: the MLP as one op, and as two groups with torch's activation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_clock import median_us
from ..lora.api import run_group
from ..lora.gpu_support import BF16, rand, same_dtypes
from ..lora.projection import Dtypes
from . import fused_gpu_speed
from .api import run_mlp
from .gpu import derive, make_mlp
from .structure import Mlp

_SIZES = (8192, 4096, 14336, 16)
"""Tokens, inputs, features and rank: a layer of Llama 3.1 8B."""


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds and MiB."""
    yield from fused_gpu_speed.speed_checks()
    for base in ("dense", "nf4"):
        yield f"speed mlp {base}", partial(_measure, base)


def _measure(base: str) -> dict[str, Any]:
    """The op, the same projections with torch's activation between them, and the frozen products alone."""
    tokens, size, features, rank = _SIZES
    dtypes = same_dtypes(BF16)
    mlp = make_mlp("gate and up", size, features, rank, dtypes, base, 0.0)
    x, dy = (rand(tokens, size, dtype=BF16) for _ in range(2))
    weights = [projection.weight.decode(dtype=BF16) for projection in mlp.projections]

    def apart(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: list[None]) -> Tensor:
        gate, up = run_group(x, mlp.inner, dtypes, seeds[:-1])
        return run_group(torch.nn.functional.silu(gate) * up, [mlp.down], dtypes, seeds[-1:])[0]

    def frozen() -> None:
        gate, up, down = weights
        h = x @ gate.t()
        torch.mm(x, up.t())
        torch.mm(h, down.t())
        dh = dy @ down
        torch.addmm(dh @ gate, dh, up)

    figures = {"frozen_products_us": median_us(frozen)}
    for name, run in (("op", run_mlp), ("apart", apart)):
        figures[f"{name}_us"] = median_us(lambda run=run: derive(run, x, mlp, dtypes, [None] * 3, dy))  # type: ignore[misc]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        derive(run, x, mlp, dtypes, [None] * 3, dy)
        figures[f"{name}_peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return figures
