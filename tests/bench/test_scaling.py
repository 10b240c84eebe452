"""Growth with one size at a time: what varies, what stays, and the largest size that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.bench import scaling
from fastpeft.bench.largest import CLOSE, largest, predicted
from fastpeft.bench.records import load
from fastpeft.bench.report.growth import growths
from fastpeft.bench.scaling import BATCH, CONTEXT, CPU, Scales
from fastpeft.bench.steps import Sides, StepCase

TINY = Scales(
    StepCase("llama", "lora", torch.float32, hidden=64, layers=1, rows=2, tokens=16, words=100),
    {
        "tokens": (8, 16, 32),
        "rows": (1, 2, 4),
        "layers": (1, 2),
        "rank": (2, 4),
        "vocabulary": (50, 80),
        "adapters": (1, 4),
    },
)


@pytest.mark.parametrize("limit", [1, 4, 5, 37, 64, 1000])
def test_the_largest_that_fits_is_found_closely(limit: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest(fits, 4, 512)
    assert (found == 0) if limit < 4 else found <= min(limit, 512) < max(found + 1, CLOSE * found) + 1
    assert max(asked) <= 512 and len(asked) == len(set(asked)) <= 14


def test_what_grows_in_proportion_or_faster_is_predicted_and_a_constant_is_not_trusted() -> None:
    assert predicted([(1, 10.0), (2, 20.0), (4, 40.0)], 404.0) == 40
    assert predicted([(1, 1.0), (2, 4.0), (4, 16.0)], 1630.0) == 40
    assert predicted([(1, 100.0), (2, 101.0), (4, 103.0)], 1040.0) == 40  # it is 941
    with pytest.raises(
        ValueError, match=r"points: expected three sizes at least, with peaks above 0, got \[\(1, 1.0\)"
    ):
        predicted([(1, 1.0), (2, 4.0)], 10.0)


def test_one_size_varies_and_the_batch_of_adapters_keeps_its_tokens() -> None:
    for axis, sizes in CPU.sizes.items():
        assert list(sizes) == sorted(set(sizes)) and len(sizes) >= 3, axis
    assert CPU.at("vocabulary", 7) == replace(CPU.case, words=7)
    assert CPU.at("rank", 7) == replace(CPU.case, rank=7)
    mixed = CPU.at("adapters", 2)
    assert mixed.rows == 8 and mixed.rows * mixed.tokens == CPU.case.rows * CPU.case.tokens
    assert mixed == CPU.at("adapters", 8)


def test_the_report_reads_a_line_a_peer_from_each_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps whose time and memory are made up: proportional to tokens, constant otherwise."""

    def made_up(case: StepCase, adapters: int, rounds: int, device: str) -> Sides:
        times = {"peft": 2.0 * case.tokens, "peft again": 2.0 * case.tokens, "fastpeft": 1.0 * case.tokens}
        memory = {"peft": 2**24 * case.tokens, "fastpeft": 2**20 * case.tokens}
        return Sides({name: [time] * rounds for name, time in times.items()}, memory, memory, torch.nn.Identity())

    monkeypatch.setattr(scaling, "_sides", made_up)
    out = tmp_path / "scaling.jsonl"
    assert scaling.main(["--rounds", "2", "--memory", "1.01", "--out", str(out)], TINY) == 0
    records = load(out)
    lines = growths({"cpu/scaling.jsonl": records})
    found = {(line.axis, line.metric, line.peer): [size for size, _ in line.points] for line in lines}
    metrics = ("step time", "kept for backward", "peak memory")
    peers = ("peft", "fastpeft")
    assert found == {(a, m, p): list(sizes) for a, sizes in TINY.sizes.items() for m in metrics for p in peers}
    exponents = [line.fit.exponent for line in lines if line.axis == "tokens" and line.fit]
    assert exponents == pytest.approx([1.0] * 6)
    most = {
        (record.metric, record.peer): (record.median, record.unit) for record in records if "found" in record.settings
    }
    assert most[CONTEXT, "peft"] == (64, "tokens") and most[CONTEXT, "fastpeft"] == (1034, "tokens")
    assert most[BATCH, "peft"] == (16, "rows")


@pytest.mark.full
@pytest.mark.parametrize("axis", list(TINY.sizes))
def test_real_steps_along_an_axis(axis: str) -> None:
    made: list[dict[str, Any]] = []
    peaks = scaling.measure(TINY, axis, 1, lambda **fields: made.append(fields))
    assert [size for size, _ in peaks["fastpeft"]] == list(TINY.sizes[axis])
    assert all(peak > 0 for points in peaks.values() for _, peak in points)
    assert {fields["settings"][axis] for fields in made} == set(TINY.sizes[axis])
    if axis in ("tokens", "rows", "layers"):
        assert all(points == sorted(points, key=lambda each: each[1]) for points in peaks.values())
