"""What to compile ahead of time: the kernel as launched for usual models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..common.aot import AotCase


def cases() -> Iterator[AotCase]:
    """Whole heads and parts of them, all layouts, forward and backward, keys or queries alone, tables in fp32."""
    for transposed in (False, True):
        yield _case(64, 64, "separated", transposed=transposed, pairs=True)
        yield _case(64, 64, "halved", transposed=transposed, pairs=True)
        yield _case(256, 256, "halved", transposed=transposed, alone="q")
        for layout in ("halved", "interleaved"):
            yield _case(128, 128, layout, transposed=transposed)
        yield _case(80, 32, "halved", transposed=transposed)
        yield _case(128, 64, "interleaved", transposed=transposed, pairs=True)
    for dtype in ("fp16", "fp32"):
        yield _case(64, 64, "halved", dtype=dtype)
    yield _case(128, 128, "halved", table="fp32")
    yield _case(128, 128, "halved", transposed=True, alone="k")
    yield _case(256, 256, "halved")


def _case(
    dim: int,
    turned: int,
    layout: str,
    *,
    dtype: str = "bf16",
    table: str | None = None,
    transposed: bool = False,
    pairs: bool = False,
    alone: str = "",
) -> AotCase:
    import triton

    from ..common.aot import AotCase, signature_of
    from .forward import HEADS, rotary_kernel

    constants = {
        "DIM": dim,
        "TURNED": turned,
        "READS_NEIGHBOURS": layout == "interleaved" or (layout == "separated" and not transposed),
        "WRITES_NEIGHBOURS": layout == "interleaved" or (layout == "separated" and transposed),
        "PAIRS": pairs,
        "TRANSPOSED": transposed,
        "BLOCK_HEADS": HEADS,
        "BLOCK_PAIRS": triton.next_power_of_2(turned // 2),
        "BLOCK_REST": triton.next_power_of_2(dim - turned) if dim > turned else 0,
    }
    other = {"q": "k", "k": "q"}.get(alone)
    absent = (f"{other}_ptr", f"{other}_out_ptr") if other else ()
    constants |= dict.fromkeys(absent)  # type: ignore[arg-type]
    names = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
    types = {name: f"*{dtype}" for name in names if name not in absent}
    types |= {name: f"*{table or dtype}" for name in ("cos_ptr", "sin_ptr")}
    if table:  # then the results are in its dtype
        types |= {name: f"*{table}" for name in ("q_out_ptr", "k_out_ptr")}
    types |= dict.fromkeys(("tokens", "q_heads", "k_heads"), "i32")
    signature = signature_of(rotary_kernel, constants, types, "i32:16")
    parts = ["bwd" if transposed else "fwd", str(dim), str(turned), layout, dtype]
    flags = {"pairs": pairs, f"table_{table}": table is not None, f"{alone}_alone": bool(alone)}
    name = "_".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])
    return AotCase(name, rotary_kernel, signature, constants, num_warps=4)
