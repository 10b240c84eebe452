"""What to compile ahead of time: rows of usual sizes, for GPUs that know e4m3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .reference import LARGEST, LEAST

if TYPE_CHECKING:
    from ..common.aot import AotCase


def cases() -> Iterator[AotCase]:
    """A row that one tile holds and one of several; every dtype; odd sizes."""
    for dtype, columns in (("bf16", 4096), ("bf16", 256), ("fp16", 4096), ("fp32", 4096)):
        yield _case(dtype, columns)
    yield _case("bf16", 4096, aligned=False)


def _case(dtype: str, columns: int, aligned: bool = True) -> AotCase:
    from ..common.aot import TARGETS, AotCase
    from .api import CAPABILITY
    from .forward import block_and_warps, quantise_rows_kernel

    block, warps = block_and_warps(columns)
    integer = "i32:16" if aligned else "i32"
    signature = {"x_ptr": f"*{dtype}", "codes_ptr": "*u8", "scale_ptr": "*fp32", "columns": integer}
    return AotCase(
        f"rows_{dtype}_{columns}{'' if aligned else '_unaligned'}",
        quantise_rows_kernel,
        signature | {"x_stride": integer},
        {"LARGEST": LARGEST, "LEAST": LEAST, "BLOCK": block},
        num_warps=warps,
        targets=tuple(target for target in TARGETS if target >= CAPABILITY),
    )
