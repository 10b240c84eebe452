"""Which weights share a measurement of decoding, and between whom it chooses."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels.quant import choosing, encode_4bit
from fastpeft_kernels.quant.choosing import CHECKED_ROWS, DecodeKey, decode_backends, decode_key
from fastpeft_kernels.quant.problems import TUNABLES

CPU = torch.device("cpu")


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_what_is_timed_is_what_was_met(quant_type: str) -> None:
    out = torch.empty(6, 80)[:, :64]
    key = decode_key(encode_4bit(torch.randn(6, 64), quant_type, 32), out)
    assert key == DecodeKey(6, 64, quant_type, 32, False, "float32", False)
    problem = TUNABLES[0].problem(key, CPU)
    assert decode_key(problem.packed, problem.out) == key  # type: ignore[attr-defined]


def test_few_rows_are_held_against_fp64() -> None:
    key = DecodeKey(CHECKED_ROWS + 1, 64, "nf4", 64, True, "float32", True)
    assert key.smaller() == key._replace(rows=CHECKED_ROWS) == key.smaller().smaller()


def test_without_the_library_there_is_no_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "native_library", lambda: None)
    assert decode_backends(CPU) == ("torch",)
