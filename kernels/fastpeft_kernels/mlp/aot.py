"""What to compile ahead of time: both fused kernels as launched for the halves of one tensor, of usual sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from ..activation import KINDS
from .fused import MAX_RANK

if TYPE_CHECKING:
    from ..common.aot import AotCase
    from .fused_tiles import Config

_TENSOR_CORES = (80, 86, 89, 90, 100, 120)  # others take the separate path


def cases() -> Iterator[AotCase]:
    """Every configuration for silu in bf16; the default one for all kinds, fp16, odd rows, and some parts alone.

    With odd rows, whose loads take one element each, the backward kernel spills: such sizes are none of a model's.
    """
    from . import fused_backward, fused_forward

    for case, configs in ((_forward, fused_forward.CONFIGS), (_backward, fused_backward.CONFIGS)):
        for kind in KINDS:
            yield case(kind, configs[0])
        for config in configs[1:]:
            yield case("silu", config, default=False)
        yield case("silu", configs[0], dtype="fp16")
        yield case("silu", configs[0], default=case is _forward, aligned=False)
        yield case("gelu", configs[0], gated=False)
    for parts in product((True, False), repeat=3):
        if not all(parts):
            yield _backward("silu", fused_backward.CONFIGS[0], parts=parts)


def _forward(
    kind: str, config: Config, default: bool = True, dtype: str = "bf16", aligned: bool = True, gated: bool = True
) -> AotCase:
    from .fused_forward import gated_activation_down_fwd_kernel

    tensors = dict.fromkeys(("gate_ptr", "up_ptr", "h_ptr", "a_ptr"), dtype) | {"s_ptr": "fp32"}
    constants: dict[str, Any] = {"KIND": kind, "GATED": gated, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= {"BLOCK_R": MAX_RANK} | ({} if gated else {"gate_ptr": None})
    name = _name("fwd", kind, dtype, config, {"ungated": not gated, "unaligned": not aligned})
    return _case(name, gated_activation_down_fwd_kernel, tensors, constants, config, default, aligned)


def _backward(
    kind: str,
    config: Config,
    default: bool = True,
    dtype: str = "bf16",
    aligned: bool = True,
    gated: bool = True,
    parts: tuple[bool, ...] = (True, True, True),
) -> AotCase:
    from .fused_backward import gated_activation_adapters_bwd_kernel

    with_gate, with_up, with_down = parts
    with_gate &= gated
    names = ("dh", "gate", "up", "dgate", "dup", "b_gate", "s_gate", "b_up", "s_up", "ds_down")
    tensors = {f"{name}_ptr": dtype for name in names} | {"ds_ptr": "fp32", "sums_ptr": "fp32"}
    absent = {} if gated else dict.fromkeys(("gate_ptr", "dgate_ptr"))
    absent |= {} if with_gate else dict.fromkeys(("b_gate_ptr", "s_gate_ptr"))
    absent |= {} if with_up else dict.fromkeys(("b_up_ptr", "s_up_ptr"))
    absent |= {} if with_down else {"ds_down_ptr": None}
    constants: dict[str, Any] = {"KIND": kind, "GATED": gated, "WITH_GATE": with_gate, "WITH_UP": with_up}
    constants |= {"WITH_DOWN": with_down, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= {"BLOCK_R": MAX_RANK, "PARTS": config.parts, **absent}
    flags = {"ungated": not gated, "unaligned": not aligned}
    flags |= {} if all(parts) else {"gate": with_gate, "up": with_up, "down": with_down, "alone": not any(parts)}
    name = _name("bwd", kind, dtype, config, flags)
    return _case(name, gated_activation_adapters_bwd_kernel, tensors, constants, config, default, aligned)


def _name(what: str, kind: str, dtype: str, config: Config, flags: dict[str, bool]) -> str:
    return "_".join([what, kind, dtype, config.label.replace(" ", "_"), *(flag for flag, on in flags.items() if on)])


def _case(
    name: str,
    kernel: Any,
    tensors: dict[str, str],
    constants: dict[str, Any],
    config: Config,
    default: bool,
    aligned: bool,
) -> AotCase:
    """Sizes, ranks and strides are multiples of 16, as they usually are, which lets loads take 16 bytes."""
    from ..common.aot import AotCase, signature_of

    types = {"tokens": "i32", **{pointer: f"*{dtype}" for pointer, dtype in tensors.items()}}  # tokens: not specialised
    signature = signature_of(kernel, constants, types, "i32:16" if aligned else "i32")
    return AotCase(
        name, kernel, signature, constants, config.num_warps, 1, default,
        targets=_TENSOR_CORES, maxnreg=config.registers,
    )  # fmt: skip
