"""Measured choices of a group: each is right, is taken when it won, and keeps for backward what the others keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lora import LoraProjection, keys, lora_linear_group, problems
from fastpeft_kernels.lora.keys import GROUP, GroupKey
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.tuning import choosing, measuring
from fastpeft_kernels.tuning.measuring import measure
from fastpeft_kernels.tuning.records import Winner
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.lora.groups import adapter, projection

CPU = torch.device("cpu")
F32 = ("float32", "float32", "float32")
PROBLEMS = {tunable.op: tunable for tunable in problems.TUNABLES}


def win(key: GroupKey, **choices: str) -> None:
    fields: dict[str, Any] = {n: list(v) if isinstance(v, tuple) else v for n, v in key._asdict().items()}
    for op, choice in choices.items():
        choosing.learn(CPU, Winner(op, fields, choice, {choice: 1.0}))


def kept(run: Any) -> list[tuple[torch.Size, torch.dtype]]:
    found: list[tuple[torch.Size, torch.dtype]] = []

    def pack(t: Tensor) -> Tensor:
        found.append((t.shape, t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return found


def test_our_kernels_are_no_candidate_on_a_cpu() -> None:
    key = GroupKey(4, 64, (32,), (8,), ("float32",), *F32, False)
    win(key, **{GROUP: "triton"})
    lora_linear_group(torch.randn(4, 64, requires_grad=True), [projection(64, 32, 8)])
    assert keys.paths(CPU) == ("library",)


@pytest.mark.interpreter
@pytest.mark.parametrize("dropout", (False, True))
def test_our_kernels_are_right_and_keep_what_the_library_keeps(dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_path = pytest.importorskip("fastpeft_kernels.lora.triton_path")
    ours: list[int] = []
    forward = triton_path.forward
    monkeypatch.setattr(triton_path, "forward", lambda *args: ours.append(1) or forward(*args))
    monkeypatch.setattr(measuring, "interleaved_us", lambda functions, *_: {name: [1.0] * 4 for name in functions})
    monkeypatch.setattr("fastpeft_kernels.lora.api.paths", lambda _: ("library", "triton"))
    key = GroupKey(16, 32, (16, 16), (8, 8), ("float32",) * 2, *F32, dropout)
    found = measure(replace(PROBLEMS[GROUP], candidates=lambda _: ("library", "triton")), key, CPU, seconds=0.0)
    assert not found.dropped and found.winner is not None and found.winner.us.keys() == {"library", "triton"}
    group = [projection(32, 16, 8, dropout=0.1 * dropout) for _ in range(2)]
    x = torch.randn(16, 32, requires_grad=True)
    both = []
    for choice in ("library", "triton"):
        ours.clear()
        win(key, **{GROUP: choice})
        both.append(kept(lambda: lora_linear_group(x, group)))
        assert len(ours) == (choice == "triton")
    assert both[0] == both[1] != []


def test_a_key_tells_what_decides() -> None:
    base = FourBitWeight(encode_4bit(torch.randn(48, 64)))
    group = [LoraProjection(base, None, (adapter(3, 64, 48), adapter(20, 64, 48))), projection(64, 16)]
    dtypes, seeds = problems.Dtypes(*[torch.float32] * 3), [torch.tensor([1]), None]
    key = keys.group_key(problems.Group(group, dtypes, seeds), 100)
    assert key == GroupKey(128, 64, (48, 16), (32, 0), ("four_bit", "float32"), *F32, True)
    assert key.at(5, CPU).tokens == 8 and str(key) == "128x64x48+16, r=32, four_bit, float32, dropout"
