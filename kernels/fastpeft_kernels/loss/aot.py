"""What to compile ahead of time: the kernels as launched for usual sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..common.aot import AotCase
    from .tiles import Config

_TYPES = {
    **dict.fromkeys(("factor", "softcap", "slack", "beta", "temperature"), "fp32"),
    **{f"{whose}_{what}": "fp32" for whose in ("student", "teacher") for what in ("factor", "softcap")},
    **dict.fromkeys(("labels_ptr", "best_ptr"), "*i64"),
    "counted_ptr": "*u8",
    "ignore_index": "i32",
}
_LOGITS = ("raw_ptr", "out_ptr", "bias_ptr", "student_ptr", "teacher_ptr", "dstudent_ptr")
_BIASES = ("student_bias", "teacher_bias")
_HARD = ("labels", "top", "inverse", "others", "d_nll")
_WIDTHS = {"bf16": 8, "fp16": 8, "fp32": 4}
_EXTRAS = ("tilted", "high", "best", "total")


def cases() -> Iterator[AotCase]:
    """The default configuration with nothing and with everything, bf16 and fp32; the others in bf16.

    As default count the most used alone: the others take seconds each.
    """
    from .tiles import CONFIGS

    for config in CONFIGS:
        default = config is CONFIGS[0]
        yield _online("bf16", config, default, write=True)
        yield _online("bf16", config, default, write=False)
        yield _gradient("bf16", config, default)
        for kind in ("forward", "reverse", "mixed"):
            yield from _divergence(kind, "bf16", config)
    for dtype in ("bf16", "fp32"):
        yield _online(dtype, CONFIGS[0], False, write=True, full=True)
        yield _online(dtype, CONFIGS[0], False, write=False, full=True)
        yield _gradient(dtype, CONFIGS[0], False, full=True)
        yield from _divergence("mixed", dtype, CONFIGS[0], full=True)
    yield from _divergence("mixed", "fp32", CONFIGS[0])
    yield _rescale()


def _online(dtype: str, config: Config, default: bool, write: bool, full: bool = False) -> AotCase:
    from .triton_online import online_step_kernel

    constants = {} if full else _none("bias", "weight", *_EXTRAS)
    constants |= {"CAPPED": full, "WRITE": write} | ({"ignore_index": None} if write else {})
    what = ("written" if write else "read") + "_full" * full
    return _case(what, online_step_kernel, dtype, config, default, constants)


def _gradient(dtype: str, config: Config, default: bool, full: bool = False) -> AotCase:
    from .triton_gradient import gradient_step_kernel

    constants = {"CAPPED": full} | ({} if full else _none("bias", "weight", "d_lse", "d_total"))
    return _case("gradient" + "_full" * full, gradient_step_kernel, dtype, config, default, constants)


def _divergence(kind: str, dtype: str, config: Config, full: bool = False) -> Iterator[AotCase]:
    from .divergence_kernels import divergence_bwd_kernel, divergence_fwd_kernel

    for what, kernel in (("fwd", divergence_fwd_kernel), ("bwd", divergence_bwd_kernel)):
        types = {"out_ptr": "*fp32"} if what == "fwd" else {}
        absent = {} if full else _none(*_BIASES, *(_HARD if what == "bwd" else ()))
        constants = {"KIND": kind, "STUDENT_CAPPED": full, "TEACHER_CAPPED": full, **absent}
        yield _case(f"divergence_{what}_{kind}" + "_full" * full, kernel, dtype, config, False, constants, types)


def _none(*names: str) -> dict[str, Any]:
    return {f"{name}_ptr": None for name in names}


def _case(
    what: str,
    kernel: Any,
    dtype: str,
    config: Config,
    default: bool,
    constants: dict[str, Any],
    types: dict[str, str] | None = None,
) -> AotCase:
    """Pointers are fp32 unless they are said to be others; sizes multiples of 16, for loads of 16 bytes."""
    from ..common.aot import AotCase, signature_of

    width = _WIDTHS[dtype]
    constants = constants | {"EXACT": dtype == "fp32", "LANES": config.block // width, "WIDTH": width}
    every = _TYPES | dict.fromkeys((*_LOGITS, *(f"{name}_ptr" for name in _BIASES)), f"*{dtype}") | (types or {})
    names = [name for name in kernel.arg_names if name not in constants]
    known = {name: every.get(name, "*fp32") for name in names if name in every or name.endswith("_ptr")}
    signature = signature_of(kernel, constants, known, "i32:16")
    name = f"{what}_{dtype}_{config.block}x{config.num_warps}"
    return AotCase(name, kernel, signature, constants, num_warps=config.num_warps, default=default)


def _rescale() -> AotCase:
    from ..common.aot import AotCase
    from .triton_gradient import rescale_kernel

    signature = {"acc_ptr": "*fp32", "factor_ptr": "*fp32", "columns": "i32:16", "acc_stride": "i32:16"}
    return AotCase("rescale", rescale_kernel, signature, {"BLOCK": 1024})
