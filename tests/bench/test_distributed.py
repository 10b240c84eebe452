"""The same training in one process and in several; the committed record of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpeft.bench.bases import DENSE, NF4
from fastpeft.bench.distributed.legs import HALF, LEGS, STEPS, Leg
from fastpeft.bench.distributed.page import differences, figure, table
from fastpeft.bench.distributed.training import train
from tests.fresh import ROOT
from tests.processes import together

RECORD = ROOT / "benchmarks/results/distributed/cpu.json"
EPS = 2.0**-23


def alone(base: str, folder: Path, steps: int, accelerated: bool = True) -> list[float]:
    return train(Leg(base, accelerated=accelerated), 0, folder, steps)["losses"]  # type: ignore[no-any-return]


def assert_equal(found: list[float], wanted: list[float], peft: list[float]) -> None:
    """Within twice what fp32 itself makes of another order of sums, as plain PEFT shows it, and an ulp."""
    rounding = max(abs(a - b) for a, b in zip(wanted, peft, strict=True))
    assert len(found) == len(wanted)
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 2 * rounding + 2 * EPS * max(wanted)


@pytest.mark.parametrize(
    ("base", "way", "processes"),
    [
        (DENSE, "ddp", 2),
        (NF4, "fsdp2", 2),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in ((NF4, "ddp", 2), (DENSE, "fsdp2", 2), (NF4, "fsdp2", 4))
        ),
    ],
)
def test_losses_are_those_of_one_process(base: str, way: Any, processes: int, tmp_path: Path) -> None:
    steps, leg = 4, Leg(base, way, processes)
    wanted, peft = (alone(base, tmp_path, steps, accelerated) for accelerated in (True, False))
    for each in together(processes, lambda rank: train(leg, rank, tmp_path, steps), tmp_path):
        assert_equal(each["losses"], wanted, peft)
        assert each["fused"] == each["layers"] == 14
        whole, part = (train_bytes(base), each["frozen_bytes"])
        assert part == whole if way == "ddp" else whole <= part * processes < 1.1 * whole


def train_bytes(base: str) -> int:
    """Of all frozen parameters."""
    from fastpeft.bench.distributed.training import tiny_model

    return sum(p.numel() * p.element_size() for p in tiny_model(base).parameters() if not p.requires_grad)


@pytest.mark.full
@pytest.mark.parametrize("base", [DENSE, NF4])
def test_a_checkpoint_goes_on_with_another_number_of_processes(base: str, tmp_path: Path) -> None:
    first = Leg(base, "fsdp2", 2)
    together(2, lambda rank: train(first, rank, tmp_path), tmp_path)
    wanted, peft = (alone(base, tmp_path, STEPS, accelerated)[HALF:] for accelerated in (True, False))
    assert_equal(train(Leg(base, start=first), 0, tmp_path)["losses"], wanted, peft)
    (tmp_path / "four").mkdir()
    four = Leg(base, "fsdp2", 4, first)
    for each in together(4, lambda rank: train(four, rank, tmp_path), tmp_path / "four"):
        assert_equal(each["losses"], wanted, peft)


def test_the_committed_record_has_every_leg_and_equal_losses(tmp_path: Path) -> None:
    found = json.loads(RECORD.read_text())
    assert [(leg["base"], leg["name"]) for leg in found["legs"]] == [(leg.base, leg.name) for leg in LEGS]
    away = differences(found)
    for leg in found["legs"]:
        rounding = max(away[leg["base"], "one process, plain PEFT"])
        assert max(away[leg["base"], leg["name"]]) <= 2 * rounding + 2 * EPS * max(leg["losses"]), leg["name"]
        assert leg["losses"][-1] < found["legs"][0]["losses"][0] - 0.5, "nothing was learned"
    page = (ROOT / "docs/how-to/several-gpus.md").read_text()
    assert table(found) in page
    figure(found, tmp_path / "losses.svg")
    assert (tmp_path / "losses.svg").stat().st_size > 10_000
