"""Decoding of nested NF4 to bf16 beside a copy of the result, which moves more bytes and computes nothing."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.integrations.bitsandbytes import BitsAndBytesWeight, frozen_weight
from fastpeft_kernels.quant import decode_4bit

from . import unsloth_functions
from .left_out import NotHereError, reason_of
from .steps import nf4_linear
from .timer import Step, interleaved

COUNT = 4  # weights in turn, so that no cache holds the next
TOLERANCE = 1e-2  # relative, of the Frobenius norm


@dataclass
class DecodeResult:
    """Times by peer, and what the peers move.

    Attributes:
        ms: milliseconds in each round.
        moved: bytes read and written at the least.
        left_out: why a peer was not measured.
    """

    name: str
    ms: dict[str, list[float]] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def gb_s(self, peer: str, ms: float) -> float:
        """Bytes moved a nanosecond."""
        return self.moved[peer] / ms / 1e6

    def bandwidth_to_copy(self) -> float:
        """Ours as a share of the copy's, median over rounds."""
        pairs = zip(self.ms["fastpeft"], self.ms["copy"], strict=True)
        return median(self.gb_s("fastpeft", ours) / self.gb_s("copy", copy) for ours, copy in pairs)


def measure(shape: tuple[int, int], device: str, rounds: int, clock: Callable[[Step], float]) -> DecodeResult:
    """Time every decoder of random weights of (rows, columns), after a check that they agree; ours must work."""
    rows, columns = shape
    layers = []
    for _ in range(COUNT):
        dense = nn.Linear(columns, rows, bias=False, device=device, dtype=torch.bfloat16)
        layers.append(nf4_linear(dense, torch.bfloat16))
    outs = [torch.empty(shape, device=device, dtype=torch.bfloat16) for _ in layers]
    result = DecodeResult(f"decode {rows}x{columns}")
    frozen: list[BitsAndBytesWeight] = []
    for layer in layers:
        weight = frozen_weight(layer)
        if isinstance(weight, str):
            raise AssertionError(weight)
        frozen.append(weight)
    ours: list[Step] = [partial(decode_4bit, weight.packed, out) for weight, out in zip(frozen, outs, strict=True)]
    wanted = [decode_4bit(weight.packed).clone() for weight in frozen]
    copies: list[Step] = [partial(out.copy_, source) for out, source in zip(outs, wanted, strict=True)]
    decoders: dict[str, Callable[[], list[Step]]] = {
        "fastpeft": lambda: ours,
        "copy": lambda: copies,
        "bitsandbytes": lambda: [partial(_bitsandbytes, layer) for layer in layers],
        "bitsandbytes, out": lambda: [partial(_bitsandbytes, *pair) for pair in zip(layers, outs, strict=True)],
        "unsloth functions, out": lambda: _unsloth(layers, outs),
    }
    steps: dict[str, Step] = {}
    for name, make in decoders.items():
        try:
            for out in outs:
                out.fill_(torch.nan)
            calls = make()
            for call, values in zip(calls, wanted, strict=True):
                _check(call(), values)
            steps[name] = partial(_next, cycle(calls))
        except NotHereError as error:
            result.left_out[name] = reason_of(error)
        except Exception as error:
            if name in ("fastpeft", "copy"):
                raise
            traceback.print_exc()
            result.left_out[name] = reason_of(error)
    packed = sum(tensor.nbytes for tensor in frozen[0].packed.tensors)
    result.moved = {name: outs[0].nbytes + (outs[0].nbytes if name == "copy" else packed) for name in steps}
    result.ms = interleaved(steps, rounds, warmup=COUNT, clock=clock)
    return result


def _next(calls: Any) -> object:
    return next(calls)()


def _bitsandbytes(layer: Any, out: Tensor | None = None) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state, out=out)  # type: ignore[no-any-return]


def _unsloth(layers: Sequence[Any], outs: Sequence[Tensor]) -> list[Step]:
    functions = unsloth_functions.load()
    return [
        partial(functions.fast_dequantize, layer.weight.data, layer.weight.quant_state, out=out)
        for layer, out in zip(layers, outs, strict=True)
    ]


def _check(found: Any, wanted: Tensor) -> None:
    deviation = ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()
    if not deviation <= TOLERANCE:
        raise AssertionError(f"deviates from fastpeft's by {deviation:.1e}, over {TOLERANCE:.0e}")


def table(results: Sequence[DecodeResult]) -> str:
    """One line a weight and peer."""
    lines = [f"{'':46}{'us':>9}{'GB/s':>9}"]
    for result in results:
        lines.append(result.name)
        for peer, samples in result.ms.items():
            ms = median(samples)
            lines.append(f"    {peer:42}{1e3 * ms:9.1f}{result.gb_s(peer, ms):9.0f}")
        lines += [f"    {peer:42} left out: {reason}" for peer, reason in result.left_out.items()]
    return "\n".join(lines)
