"""bitsandbytes' 4-bit layers as frozen weights, their storage read in place."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpeft_kernels.lora.parts import decoded
from fastpeft_kernels.native import native_library
from fastpeft_kernels.quant import Packed4bit
from fastpeft_kernels.weights import FourBitWeight
from fastpeft_kernels.weights.base import Rows

from ..layers.bypass import own_class, why_not_bypassed
from ..layers.kept import AWAY, is_elsewhere

CPU_PACKED = "4-bit storage rearranged by bitsandbytes for CPU inference (packing_format_for_cpu)"

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BitsAndBytesWeight(FourBitWeight):
    """FourBitWeight that bitsandbytes decodes on CPU where our C++ is missing, or where it misreads the weight."""

    kind = "bitsandbytes_4bit"

    @property
    def fills(self) -> bool:  # type: ignore[override]
        if self.device.type != "cpu":
            return True
        return not _misread(self.shape[1], self.packed.blocksize) and native_library() is not None

    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        packed = self.packed
        dtype = dtype or self.dtype
        if self.fills or rows is not None or out is not None or dtype not in CPU_DTYPES:
            return super().decode(out, rows, dtype)
        absmax = packed.absmax
        if packed.nested_absmax is not None:
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(
                absmax, packed.nested_absmax, packed.nested_code, packed.nested_blocksize, torch.float32
            )
            absmax += packed.nested_offset
        values = packed.packed.view(-1, 1)
        return torch.ops.bitsandbytes.dequantize_4bit(  # type: ignore[no-any-return]
            values, absmax, packed.blocksize, packed.quant_type, list(self.shape), dtype
        )


_WEIGHTS: dict[int, tuple[ref[Any], BitsAndBytesWeight, tuple[Any, ...]]] = {}
"""A QuantState, what was read of it, and the parts that were; by id, since a QuantState cannot be hashed."""


def linear_4bit() -> type[nn.Module] | None:
    """bitsandbytes' Linear4bit, or None when bitsandbytes was never imported, so that no model can hold one."""
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return None if modules is None else modules.Linear4bit


def is_linear_4bit(module: nn.Module) -> bool:
    """True for bitsandbytes' Linear4bit itself, also where it is a frozen sibling, not for other subclasses."""
    kind = linear_4bit()
    return kind is not None and own_class(module) is kind


def frozen_weight(layer: nn.Module) -> BitsAndBytesWeight | str:
    """The frozen weight of a Linear4bit, or the reason why its storage cannot be read."""
    weight: Any = layer.weight
    if is_elsewhere(weight):
        return AWAY
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(layer, "quant_state", None)  # FSDP2 gives parameters that have lost theirs
        _check_not_cast(weight, getattr(layer, "quant_storage", weight.dtype))
    if state is None:
        return "a 4-bit weight without quant_state: not quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return CPU_PACKED
    tracing = torch.compiler.is_compiling()
    key = id(state)
    known = None if tracing else _WEIGHTS.get(key)
    if known is not None and known[0]() is state and _same_storage(known[1].packed, known[2], weight, state):
        return known[1]
    if len(state.shape) != 2:
        return f"a 4-bit weight of shape {tuple(state.shape)}"
    try:
        frozen = BitsAndBytesWeight(_packed(weight, state))
    except (TypeError, ValueError) as error:
        return f"4-bit storage that cannot be read: {error}"
    if not tracing:
        _WEIGHTS[key] = (ref(state, lambda _: _WEIGHTS.pop(key, None)), frozen, _parts(state))
    return frozen


def _check_not_cast(weight: Tensor, stored: torch.dtype) -> None:
    """Raise ValueError where FSDP2 has cast packed values as if they were numbers, which no one can undo."""
    if stored.is_floating_point and weight.dtype.is_floating_point and weight.dtype != stored:
        raise ValueError(
            f"4-bit weight: expected its storage in {stored}, got {weight.dtype}: FSDP2's mixed precision casts "
            f"floating storage; load with bnb_4bit_quant_storage={weight.dtype}, or train without mixed precision"
        )


def forget(layer: Any) -> None:
    """Let go of the storage that `frozen_weight` has read: the layer is about to be moved, or is no longer ours."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is not None:
        _WEIGHTS.pop(id(state), None)


def decode_note(layer: Any) -> str:
    """What the user should know of the way in which bitsandbytes reads this layer's weight here; mostly nothing.

    We decode as PEFT's forward would, so that numbers agree.
    """
    state = getattr(layer.weight, "quant_state", None)
    if state is None or layer.weight.device.type != "cpu" or not _misread(state.shape[-1], state.blocksize):
        return ""
    return (
        f"on this CPU bitsandbytes misreads 4-bit rows of {state.shape[-1]} in blocks of {state.blocksize}; "
        "followed as it is"
    )


def compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The dtype in which the layer multiplies x; settles it on the first call exactly as the layer itself would."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return layer.compute_dtype or x.dtype


def decoded_linear(layer: Any, x: Tensor) -> Tensor | None:
    """The forward of a Linear4bit by our decoding, without gradients; None where the layer must be called.

    Args:
        layer: any module.
        x: (..., in_features) on a CPU; fp32 without autocast, else None is returned.
    """
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not is_linear_4bit(layer):
        return None
    if why_not_bypassed(layer, type(layer), x.device) is not None or compute_dtype(layer, x) != torch.float32:
        return None
    frozen, bias = frozen_weight(layer), layer._parameters["bias"]
    if isinstance(frozen, str) or frozen.device != x.device or (bias is not None and bias.dtype != torch.float32):
        return None
    return linear(x, decoded(frozen, torch.float32), bias)


def dense_linear(layer: Any) -> nn.Linear:
    """A Linear4bit's values as an fp32 nn.Linear, decoded by bitsandbytes itself, to hold `frozen_weight` against."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(dequantize_4bit(layer.weight.data, state), requires_grad=False)
    dense.bias = copy.deepcopy(layer.bias)
    return dense


def forbid_cpu_packing(layer: Any) -> bool | None:
    """Keep bitsandbytes from rearranging the weights in place on a CPU; returns the setting to give back."""
    before: bool | None = getattr(layer, "support_avx512bf16_for_cpu", None)
    if before is not None:
        layer.support_avx512bf16_for_cpu = False
    return before


def allow_cpu_packing(layer: Any, before: bool | None) -> None:
    """Undo `forbid_cpu_packing`."""
    if before is not None:
        layer.support_avx512bf16_for_cpu = before


@contextmanager
def cpu_packing_forbidden(layers: Iterable[Any]) -> Iterator[None]:
    """`forbid_cpu_packing` for a while."""
    before = [(layer, forbid_cpu_packing(layer)) for layer in layers]
    try:
        yield
    finally:
        for layer, setting in before:
            allow_cpu_packing(layer, setting)


def _misread(columns: int, blocksize: int) -> bool:
    """Whether bitsandbytes reads rows of so many columns wrongly on this CPU.

    The AVX-512 decoder of its version 0.50 looks scales up by row, its format stores them along the flat matrix; the
    two differ where a row is no whole number of blocks.
    """
    wrong = columns % blocksize != 0 and columns % 16 == 0 and blocksize < 2048
    return wrong and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _packed(weight: Tensor, state: Any) -> Packed4bit:
    nested = state.state2 if state.nested else None
    return Packed4bit(
        packed=weight.detach().view(torch.uint8).view(-1),
        absmax=state.absmax,
        code=state.code,
        blocksize=state.blocksize,
        shape=(state.shape[0], state.shape[1]),
        dtype=state.dtype,
        quant_type=state.quant_type,
        nested_absmax=None if nested is None else nested.absmax,
        nested_code=None if nested is None else nested.code,
        nested_offset=None if nested is None else state.offset,
        nested_blocksize=None if nested is None else nested.blocksize,
    )


def _parts(state: Any) -> tuple[Any, ...]:
    """What a QuantState tells beside its absmax."""
    found = (state.code, state.blocksize, state.shape, state.dtype, state.quant_type)
    if not state.nested:
        return found
    nested = state.state2
    return (*found, state.offset, nested.absmax, nested.code, nested.blocksize)


def _same_storage(packed: Packed4bit, parts: tuple[Any, ...], weight: Tensor, state: Any) -> bool:
    """Addresses decide, whose memory `packed` keeps alive, so that nothing else comes to lie there; else identity."""
    same = packed.packed.data_ptr() == weight.data_ptr() and packed.absmax.data_ptr() == state.absmax.data_ptr()
    now = _parts(state)
    return same and len(parts) == len(now) and all([a is b for a, b in zip(parts, now, strict=True)])
