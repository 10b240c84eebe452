"""bitsandbytes beside us: its storage, and what it decodes it to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.quant import Packed4bit


class Peer:
    """bitsandbytes' 4-bit functions."""

    def __init__(self, functional: Any) -> None:
        self.functional = functional

    def encode(
        self, weight: Tensor, quant_type: str, blocksize: int, nested: bool, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Its packed bytes and its QuantState."""
        return self.functional.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested, **kwargs
        )

    def decode(self, packed: Tensor, state: Any) -> Tensor:
        """What it decodes on every path but AVX512's, which takes wrong scales where in_features % blocksize is not 0.

        As a single row, with blocks that no row end interrupts, that path is right too.
        """
        shape, state.shape = state.shape, torch.Size((1, state.shape[0] * state.shape[1]))
        with torch.compiler.set_stance("force_eager"):
            flat = self.functional.dequantize_4bit(packed.reshape(-1, 1), state)
        state.shape = shape
        return flat.reshape(shape)

    @staticmethod
    def storage(packed: Tensor, state: Any) -> Packed4bit:
        """The same storage in our terms."""
        nested = state.state2 if state.nested else None
        return Packed4bit(
            packed,
            state.absmax,
            state.code,
            state.blocksize,
            tuple(state.shape),
            state.dtype,
            state.quant_type,
            nested and nested.absmax,
            nested and nested.code,
            state.offset if nested else None,
            nested and nested.blocksize,
        )


@pytest.fixture(scope="session")
def bitsandbytes() -> Peer:
    return Peer(pytest.importorskip("bitsandbytes.functional"))
