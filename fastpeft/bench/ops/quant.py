"""Decoding of NF4 with nested scales, beside a copy of the result, which moves more bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.quant import decode_4bit

from .. import unsloth_functions
from . import models
from .case import Floor, Forward, Inputs, OpCase
from .four_bit import bitsandbytes_state, decode, encode, stored_bytes
from .making import Numbers
from .peers import compiled


def cases(device: str, depth: str) -> Iterator[OpCase]:
    """The up projection of each model."""
    shapes, dtypes = [models.QWEN3_600M], [torch.float32, torch.bfloat16]
    if device == "cuda":
        shapes, dtypes = [models.LLAMA_8B], [torch.bfloat16]
    if depth != "quick":
        shapes += [models.LLAMA_70B] if device == "cuda" else [models.QWEN3_4B]
    if depth == "full":
        shapes += [models.QWEN3_4B, models.QWEN3_32B] if device == "cuda" else [models.LLAMA_8B]
        dtypes += [torch.float16, torch.float32] if device == "cuda" else [torch.float16]
    for shape in shapes:
        for dtype in dtypes:
            yield case(shape, dtype)


def case(shape: models.Shape, dtype: torch.dtype) -> OpCase:
    """Of one model's up projection, into memory that is there already for all who can."""
    rows, columns = shape.intermediate, shape.hidden
    return OpCase(
        op="quant",
        name=f"decode NF4, {shape.name} up_proj {rows} x {columns}",
        dtype=dtype,
        make=partial(_make, (rows, columns), dtype),
        floors={"forward": Floor(0, stored_bytes(rows, columns) + rows * columns * dtype.itemsize)},
        reference=_torch,
        peers={
            "fastpeft": _fastpeft,
            "copy": _copy,
            "torch.compile": compiled(_torch),
            "bitsandbytes": _bitsandbytes,
            "unsloth": _unsloth,
        },
        settings={"model": shape.name, "rows": rows, "columns": columns},
    )


def _make(shape: tuple[int, int], stored: torch.dtype, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    weight = Numbers(device, stored, stored, seed).normal(*shape, scale=0.02)
    return Inputs({}, extra={"packed": encode(weight), "dtype": dtype})


def _torch(inputs: Inputs) -> Forward:
    packed, dtype = inputs.extra["packed"], inputs.extra["dtype"]
    return lambda: (decode(packed, dtype),)


def _fastpeft(inputs: Inputs) -> Forward:
    packed, out = inputs.extra["packed"], _room(inputs)
    return lambda: (decode_4bit(packed, out),)


def _copy(inputs: Inputs) -> Forward:
    values, out = decode(inputs.extra["packed"], inputs.extra["dtype"]), _room(inputs)
    return lambda: (out.copy_(values),)


def _bitsandbytes(inputs: Inputs) -> Forward:
    packed, out = inputs.extra["packed"], _room(inputs)
    state, stored = bitsandbytes_state(packed), packed.packed.view(-1, 1)
    from bitsandbytes.functional import dequantize_4bit

    into = {"out": out} if out.is_cuda else {}  # it has no such operation on a CPU
    return lambda: (dequantize_4bit(stored, state, **into),)


def _unsloth(inputs: Inputs) -> Forward:
    functions: Any = unsloth_functions.load()
    packed, out = inputs.extra["packed"], _room(inputs)
    state, stored = bitsandbytes_state(packed), packed.packed.view(-1, 1)
    return lambda: (functions.fast_dequantize(stored, state, out=out),)


def _room(inputs: Inputs) -> Tensor:
    """Memory for the values that holds none of them."""
    packed = inputs.extra["packed"]
    return torch.full(packed.shape, torch.nan, dtype=inputs.extra["dtype"], device=packed.device)
