"""What to compile ahead of time: the kernels as launched for usual sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..common.aot import AotCase
    from .tiles import Config

_NUMBERS = {"factor": "fp32", "softcap": "fp32", "slack": "fp32"}
_WIDTHS = {"bf16": 8, "fp16": 8, "fp32": 4}
_EXTRAS = ("tilted", "high", "best", "total")


def cases() -> Iterator[AotCase]:
    """The default configuration with nothing and with everything, bf16 and fp32; the others in bf16."""
    from .tiles import CONFIGS

    for config in CONFIGS:
        default = config is CONFIGS[0]
        yield _online("bf16", config, default, write=True)
        yield _online("bf16", config, default, write=False)
        yield _gradient("bf16", config, default)
    for dtype in ("bf16", "fp32"):
        yield _online(dtype, CONFIGS[0], dtype == "bf16", write=True, full=True)
        yield _online(dtype, CONFIGS[0], False, write=False, full=True)
        yield _gradient(dtype, CONFIGS[0], dtype == "bf16", full=True)
    yield _rescale()


def _online(dtype: str, config: Config, default: bool, write: bool, full: bool = False) -> AotCase:
    from .triton_online import online_step_kernel

    absent = [] if full else ["bias", "weight", *_EXTRAS]
    constexprs = {"WRITE": write, **({"ignore_index": None} if write else {})}
    types = {"best_ptr": "*i64", "ignore_index": "i32"}
    what = "written" if write else "read"
    return _case(what, online_step_kernel, dtype, config, default, full, absent, constexprs, types)


def _gradient(dtype: str, config: Config, default: bool, full: bool = False) -> AotCase:
    from .triton_gradient import gradient_step_kernel

    absent = [] if full else ["bias", "weight", "d_lse", "d_total"]
    return _case("gradient", gradient_step_kernel, dtype, config, default, full, absent, {}, {})


def _case(
    what: str,
    kernel: Any,
    dtype: str,
    config: Config,
    default: bool,
    full: bool,
    absent: list[str],
    constexprs: dict[str, Any],
    types: dict[str, str],
) -> AotCase:
    """Pointers are fp32 but for the logits, the bias and the labels; sizes multiples of 16, for loads of 16 bytes."""
    from ..common.aot import AotCase, signature_of

    width = _WIDTHS[dtype]
    constants = {f"{name}_ptr": None for name in absent} | constexprs
    constants |= {"CAPPED": full, "EXACT": dtype == "fp32", "LANES": config.block // width, "WIDTH": width}
    types = types | _NUMBERS | dict.fromkeys(("raw_ptr", "out_ptr", "bias_ptr"), f"*{dtype}") | {"labels_ptr": "*i64"}
    types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr") and name not in types}
    known = {name: kind for name, kind in types.items() if name in kernel.arg_names and name not in constants}
    name = f"{what}_{dtype}_{config.block}x{config.num_warps}{'_full' if full else ''}"
    signature = signature_of(kernel, constants, known, "i32:16")
    return AotCase(name, kernel, signature, constants, num_warps=config.num_warps, default=default)


def _rescale() -> AotCase:
    from ..common.aot import AotCase
    from .triton_gradient import rescale_kernel

    signature = {"acc_ptr": "*fp32", "factor_ptr": "*fp32", "columns": "i32:16", "acc_stride": "i32:16"}
    return AotCase("rescale", rescale_kernel, signature, {"BLOCK": 1024})
