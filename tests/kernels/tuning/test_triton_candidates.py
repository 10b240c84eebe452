"""Every tile shape that a measurement may choose, in Triton's interpreter: found by its name, right, and taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpeft_kernels import tuner
from fastpeft_kernels.activation.choosing import BACKWARD, FORWARD, ActivationKey, activation_backends
from fastpeft_kernels.common import device
from fastpeft_kernels.lora.keys import (
    LINEAR,
    MIXED,
    RANK,
    LinearKey,
    MixedKey,
    RankKey,
    linear_candidates,
    rank_backends,
)
from fastpeft_kernels.mlp.fused import FUSED, FusedKey
from fastpeft_kernels.mlp.fused import candidates as fused_candidates
from fastpeft_kernels.quant.choosing import DECODE, DecodeKey, decode_backends
from fastpeft_kernels.tuning import measuring
from fastpeft_kernels.tuning.measuring import measure

pytest.importorskip("triton")
CPU = torch.device("cpu")
CASES = [
    (DECODE, DecodeKey(5, 72, "nf4", 64, True, "float32", False)),
    (DECODE, DecodeKey(4, 64, "fp4", 64, False, "float16", True)),
    (FORWARD, ActivationKey(4, 40, "silu", True, "float32")),
    (BACKWARD, ActivationKey(4, 40, "gelu", False, "float16")),
    *((LINEAR, LinearKey(16, 24, 40, "float16", transposed)) for transposed in (False, True)),
    *((RANK, RankKey(16, 40, rank, "float16")) for rank in (8, 32)),
    *((MIXED, MixedKey(16, 40, rank, "float16", 4)) for rank in (8, 32)),
    (FUSED, FusedKey(16, 48, "silu", True, "float16")),
    (FUSED, FusedKey(16, 32, "gelu", False, "float16")),
]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper for which Triton compiles."""
    monkeypatch.setattr(device, "_triton_launches", lambda index: True)
    for module in ("configs", "keys"):
        monkeypatch.setattr(f"fastpeft_kernels.lora.{module}.device_capability", lambda device: 90)


@pytest.mark.interpreter
@pytest.mark.parametrize("op, key", CASES, ids=str)
def test_all_are_right(
    op: str, key: DecodeKey | ActivationKey | LinearKey | RankKey | MixedKey | FusedKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpeft_kernels.lora.keys.triton_serves", lambda device: True)
    monkeypatch.setattr(measuring, "interleaved_us", lambda functions, *_: {name: [1.0] * 4 for name in functions})
    tunable = next(one for one in tuner.tunables() if one.op == op)
    names = tunable.candidates(torch.device("cuda", 0))
    found = measure(replace(tunable, candidates=lambda _: names), key, CPU, seconds=0.0)
    assert not found.dropped and found.winner is not None and found.winner.us.keys() == set(names)


def test_names_are_those_that_files_keep() -> None:
    """A name that changes or stands for another shape would make files lie."""
    gpu = torch.device("cuda", 0)
    assert decode_backends(gpu) == (
        *("torch", "triton", "triton 256x1", "triton 128x1 global", "triton 128x2", "triton 512x4", "triton 1024x8"),
    )
    assert activation_backends(gpu) == (
        *("torch", "triton", "triton 2x1024x4", "triton 4x1024x8", "triton 1x2048x4", "triton 1x2048x8"),
        "triton 1x512x2",
    )
    assert linear_candidates(gpu) == (
        *("torch", "triton", "triton 128x256x64 8w 4s tma g16 persistent"),
        *("triton 128x256x64 8w 3s tma g8 persistent", "triton 128x128x64 4w 3s tma g8"),
    )
    assert fused_candidates(gpu) == ("apart", "fused") and fused_candidates(CPU) == ("apart",)
    assert rank_backends(gpu) == ("library", "triton") and rank_backends(CPU) == ("library",)
    assert decode_backends(CPU) == ("torch", "native") and linear_candidates(CPU) == ("torch",)


def test_tiles_before_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft_kernels.lora.configs.device_capability", lambda device: 80)
    assert linear_candidates(torch.device("cuda", 0)) == ("torch", "triton", "triton 128x256x64 8w 3s")
