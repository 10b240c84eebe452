"""The soak finds what is planted, finds nothing where nothing is, and its page has what was recorded."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import kills
from benchmarks.soak.__main__ import PAGE, RECORD, measure
from benchmarks.soak.flatness import ALLOWED, growth
from benchmarks.soak.reporting import WORDS, figure, table
from benchmarks.soak.works import WORKS, Work
from fastpeft_kernels.tuning import choosing

UNITS = 32


def not_flat(record: dict[str, Any]) -> set[str]:
    return {name for name, values in record["figures"].items() if not growth(name, values).flat}


def test_every_planted_leak_is_found() -> None:
    kept, ended = list[Any](), threading.Event()

    def leak(units: int, folder: Path) -> Iterator[None]:
        module = nn.Linear(1, 1)
        for unit in range(units):
            kept.extend([] for _ in range(50))
            kept.extend(object() for _ in range(200))
            kept.append(torch.ones(200_000))
            kept.append(module.register_forward_hook(lambda *_: None))
            kept.append(open(os.devnull))  # noqa: SIM115
            threading.Thread(target=ended.wait, daemon=True).start()
            choosing._warned.add(f"planted {unit}")
            Path(tempfile.gettempdir(), str(unit)).write_text("x" * 1000)
            yield

    try:
        assert not_flat(measure(leak, UNITS, 16)) == set(ALLOWED) == set(WORDS)
    finally:
        ended.set()
        choosing.forget()


def test_nothing_is_found_where_nothing_is() -> None:
    def work(units: int, folder: Path) -> Iterator[None]:
        for _ in range(units):
            torch.ones(200_000).sum()
            yield

    assert not_flat(measure(work, UNITS, 16)) == set()


@pytest.mark.parametrize("values", [[0.0] * 8, [3.0, 9.0, 5.0, 4.0, *[7.0, 6.0] * 4]])
def test_what_is_made_once_or_goes_up_and_down_is_flat(values: list[float]) -> None:
    assert growth("descriptors", values).flat


def test_growth_is_that_of_the_line_through_the_second_half() -> None:
    interval = growth("objects", [0.0] * 10 + [float(n) for n in range(10)]).interval
    assert interval == pytest.approx((9.0, 9.0, 9.0))
    with pytest.raises(ValueError, match="values: expected at least 8, got 7"):
        growth("objects", [0.0] * 7)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (not name.startswith("adapters"))) for name in WORKS]
)
def test_a_short_one(name: str) -> None:
    """Of what must not grow by a single one."""
    work: Work = WORKS[name][0]
    found = measure(work, 10, 10)
    assert found["units"] == list(range(1, 11))
    assert not not_flat(found) & {"tensors", "hooks", "descriptors", "threads", "cache_kib"}


def test_the_page_has_the_records(tmp_path: Path) -> None:
    record, page = json.loads(RECORD.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    assert table(record) in page
    assert kills.table(json.loads(kills.RECORD.read_text(encoding="utf-8"))) in page
    assert record.keys() == WORKS.keys()
    figure(record, tmp_path / "soak.svg")
    assert (tmp_path / "soak.svg").stat().st_size > 1000
