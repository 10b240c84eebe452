"""What to compile ahead of time: both kernels as launched for the halves of one tensor, of usual sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from .api import KINDS

if TYPE_CHECKING:
    from ..common.aot import AotCase
    from .tiles import Config


def cases() -> Iterator[AotCase]:
    """Every configuration for silu and gelu in bf16; the default one for all kinds, dtypes, without gate, odd rows."""
    from .tiles import CONFIGS

    for backward in (False, True):
        for kind in KINDS:
            yield _case(backward, kind, "bf16", CONFIGS[0])
        for config, kind in product(CONFIGS[1:], ("silu", "gelu")):
            yield _case(backward, kind, "bf16", config, default=False)
        for dtype, kind in product(("fp16", "fp32"), ("silu", "gelu")):
            yield _case(backward, kind, dtype, CONFIGS[0])
        yield _case(backward, "gelu", "bf16", CONFIGS[0], gated=False)
        yield _case(backward, "silu", "bf16", CONFIGS[0], aligned=False)
    yield _case(True, "silu", "bf16", CONFIGS[0], with_h=False)


def _case(
    backward: bool,
    kind: str,
    dtype: str,
    config: Config,
    default: bool = True,
    gated: bool = True,
    with_h: bool = True,
    aligned: bool = True,
) -> AotCase:
    from ..common.aot import AotCase
    from .backward import gated_activation_bwd_kernel
    from .forward import gated_activation_fwd_kernel

    names = ("dh", "gate", "up", "dgate", "dup", "h") if backward else ("gate", "up", "h")
    absent = ({"gate", "dgate"} if not gated else set()) | ({"h"} if not with_h else set())
    # In the usual case sizes and strides are multiples of 16, which is what lets loads and stores take 16 bytes.
    integer = "i32:16" if aligned else "i32"
    signature = {f"{name}_ptr": f"*{dtype}" for name in names if name not in absent}
    signature |= {f"{name}_stride": integer for name in names} | {"rows": integer, "columns": integer}
    block_rows, block_columns = config.fitted(14336)
    constexprs: dict[str, Any] = {f"{name}_ptr": None for name in names if name in absent}
    constexprs |= {"KIND": kind, "GATED": gated, "EXACT": dtype == "fp32"}
    constexprs |= {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    if backward:
        constexprs["WITH_H"] = with_h
    parts = [
        "bwd" if backward else "fwd",
        kind,
        dtype,
        f"{config.block_rows}x{config.block_columns}x{config.num_warps}",
    ]
    flags = {"ungated": not gated, "without_h": not with_h, "unaligned": not aligned}
    kernel = gated_activation_bwd_kernel if backward else gated_activation_fwd_kernel
    name = "_".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])
    return AotCase(name, kernel, signature, constexprs, num_warps=config.num_warps, default=default)
