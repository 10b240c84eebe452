"""What to compile ahead of time: both kernels as launched for the norms of usual models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..common.aot import AotCase

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def cases() -> Iterator[AotCase]:
    """Llama's, Gemma's, gated ones and LayerNorm, frozen and trained, of a head, of a hidden state, of the longest."""
    for features in (128, 4096):
        for kind in ("input", "gemma", "layer"):
            yield _case("fwd", features, kind, "bf16")
            yield _case("bwd", features, kind, "bf16")
            yield _case("bwd", features, kind, "bf16", trained=True)
    for features, kind, groups in ((128, "gated", 1), (1024, "gate_first", 8)):
        yield _case("fwd", features, kind, "bf16", groups=groups)
        yield _case("bwd", features, kind, "bf16", groups=groups)
        yield _case("bwd", features, kind, "bf16", groups=groups, trained=True)
    for features, kind in ((8192, "gated"), (4096, "gate_first")):  # the longest of `form.most_features`
        yield _case("fwd", features, kind, "bf16")
        yield _case("bwd", features, kind, "bf16")
        yield _case("bwd", features, kind, "bf16", trained=True)
        yield _case("bwd", features, kind, "fp32", trained=True)
    for stage in ("fwd", "bwd"):
        yield _case(stage, 8192, "gate_first", "bf16")
    for dtype in ("fp16", "fp32"):
        yield _case("fwd", 4096, "input", dtype)
        yield _case("bwd", 4096, "input", dtype)
    for stage in ("fwd", "bwd"):
        yield _case(stage, 1023, "layer", "bf16", aligned=False)
        yield _case(stage, 16384, "input", "bf16")
        yield _case(stage, 32768, "input", "bf16", default=False)


def _case(
    stage: str,
    features: int,
    kind: str,
    dtype: str,
    *,
    trained: bool = False,
    aligned: bool = True,
    default: bool = True,
    groups: int = 1,
) -> AotCase:
    import triton.language as tl

    from ..common.aot import AotCase, signature_of
    from .backward import norm_bwd_kernel
    from .forward import norm_fwd_kernel
    from .tiles import tile

    backward, centred = stage == "bwd", kind == "layer"
    gated = kind in ("gated", "gate_first")
    block_rows, block_columns, num_warps = tile(features, kind == "gated" if gated else None)
    constants: dict[str, Any] = {"OFFSET": 1.0 if kind == "gemma" else 0.0, "CENTRED": centred}
    constants |= {"GATE_FIRST": kind == "gate_first", "GATE_LAST": kind == "gated", "SIGMOID": False, "GROUPS": groups}
    constants |= {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    if not backward:
        constants["MIDDLE"] = getattr(tl, _DTYPES[dtype]) if kind == "input" or gated else tl.float32
    pointers = ["dy", "x", "weight", "rstd", "dx"] if backward else ["x", "weight", "y", "rstd"]
    pointers += ["mean"] if centred else []
    pointers += ["gate", *(["dgate"] if backward else [])] if gated else []
    pointers += ["dweight"] if trained else []
    pointers += ["dbias"] if trained and centred else ["bias"] if centred and not backward else []
    kernel = norm_bwd_kernel if backward else norm_fwd_kernel
    wide = ("rstd", "mean", "dweight", "dbias")
    types = {f"{name}_ptr": "*fp32" if name in wide else f"*{dtype}" for name in pointers}
    constants |= {name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in types}
    types |= {"eps": "fp32"} if not backward else {}
    signature = signature_of(kernel, constants, types, "i32:16" if aligned else "i32")
    flags = {f"{groups}_groups": groups > 1, "trained": trained, "unaligned": not aligned}
    name = "_".join([stage, str(features), kind, dtype, *(flag for flag, is_set in flags.items() if is_set)])
    return AotCase(name, kernel, signature, constants, num_warps=num_warps, default=default)
