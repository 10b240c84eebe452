"""What one Llama layer costs beside PEFT's, counted: decodes; copies, casts and elementwise operations of activations.

The slope between two depths of one training step, forward and backward. docs/concepts/fused-lora.md shows the table.
"""

from __future__ import annotations

import contextlib
import copy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft_kernels.weights import FourBitWeight
from tests.integration.models import make_base, with_lora
from tests.integration.quantised import quantise
from tests.integration.steps import step

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "fused-lora.md"
ROWS, TOKENS, NARROWEST = 3, 11, 128
COPIES = {"aten::copy_"}  # a cast is one too
ELEMENTWISE = {f"aten::{name}{end}" for name in ("add", "mul", "silu", "silu_backward", "sum") for end in ("", "_")}
CASES = ("fp32", "bf16 base, fp32 adapters, autocast", "NF4, fp32")


def build(case: str, depth: int) -> nn.Module:
    dtype = torch.bfloat16 if case.startswith("bf16") else torch.float32
    base = make_base(dtype=dtype, num_hidden_layers=depth, hidden_size=256, intermediate_size=512, head_dim=64)
    return with_lora(quantise(base) if case.startswith("NF4") else base, r=8).train()


def counted(model: Any, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """(decodes, copies and casts of activations, elementwise operations on them) of a step."""
    ids = torch.randint(3, 90, (ROWS, TOKENS))
    around = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    decodes: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("fastpeft_kernels.common.device._slow_on_cpu", lambda dtype: False)  # the same on any machine
        for cls in {FourBitWeight, *FourBitWeight.__subclasses__()}:
            if "decode" in cls.__dict__:
                patch.setattr(cls, "decode", _counting(cls.decode, decodes))
        with around:
            step(model, {"input_ids": ids, "labels": ids})  # finds the siblings
            decodes.clear()
            with torch.profiler.profile(record_shapes=True) as profile:
                model(input_ids=ids, labels=ids).loss.backward()
    events = profile.key_averages(group_by_input_shape=True)
    theirs = sum(event.count for event in events if event.key == "bitsandbytes::dequantize_4bit")
    copies, others = (
        sum(event.count for event in events if event.key in names and _of_activations(event.input_shapes))
        for names in (COPIES, ELEMENTWISE)
    )
    return theirs + len(decodes), copies, others


def _of_activations(shapes: list[list[int]]) -> bool:
    """Neither of adapters nor of rank width."""
    first = shapes[0] if shapes else []
    return bool(first) and first[0] in (ROWS, ROWS * TOKENS) and prod(first) >= ROWS * TOKENS * NARROWEST


def _counting(decode: Any, calls: list[int]) -> Any:
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(calls)
        result = decode(self, *args, **kwargs)
        del calls[before:]  # one decode, though a subclass asks its parent
        calls.append(1)
        return result

    return counting


@pytest.mark.parametrize("case", CASES)
def test_as_the_page_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, list[tuple[int, int, int]]] = {"PEFT": [], "fastpeft": []}
    for depth in (1, 3):
        model = build(case, depth)
        for name, each in (("PEFT", copy.deepcopy(model)), ("fastpeft", fastpeft.accelerate(model))):
            found[name].append(counted(each, "autocast" in case, monkeypatch))
    a_layer = {n: [(deep - low) // 2 for low, deep in zip(*counts, strict=True)] for n, counts in found.items()}
    row = f"| {case} | " + " | ".join(f"{o} / {p}" for o, p in zip(a_layer["fastpeft"], a_layer["PEFT"], strict=True))
    assert row + " |" in PAGE.read_text(encoding="utf-8"), row
    assert a_layer["fastpeft"][0] <= 14
    assert a_layer["fastpeft"][2] <= a_layer["PEFT"][2]
