"""The runner of ops: who is timed, who is not and why, and what the records say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from fastpeft.bench.left_out import NotHereError
from fastpeft.bench.ops import ceilings
from fastpeft.bench.ops.case import Floor, Forward, Inputs, OpCase, Peer
from fastpeft.bench.ops.checking import truth
from fastpeft.bench.ops.finding import ops
from fastpeft.bench.ops.run import Outcome, Runner
from fastpeft.bench.ops.table import table
from fastpeft.bench.recorder import Recorder
from fastpeft.bench.records import Record, RecordFile, environment, load
from fastpeft.bench.report.rows import rows
from fastpeft.bench.report.sections import section
from fastpeft.bench.report.site import site

SIZE = 96


def make(device: str, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    x, w, dy = (torch.randn((SIZE, SIZE), generator=generator).to(dtype) for _ in range(3))
    return Inputs({"x": x.requires_grad_(), "w": w}, (x,), (dy,))


def product(inputs: Inputs) -> Forward:
    x, w = inputs.tensors.values()
    return lambda: (x @ w,)


def scaled(factor: float) -> Peer:
    def peer(inputs: Inputs) -> Forward:
        forward = product(inputs)
        return lambda: tuple(factor * y for y in forward())

    return peer


def absent(inputs: Inputs) -> Forward:
    raise NotHereError("no module named 'nowhere'")


def broken(inputs: Inputs) -> Forward:
    raise RuntimeError("it broke")


def raising(error: BaseException) -> Peer:
    def peer(inputs: Inputs) -> Forward:
        raise error

    return peer


FLOPS = 2.0 * SIZE**3
CASE = OpCase(
    op="product",
    name=f"{SIZE} x {SIZE}",
    dtype=torch.float32,
    make=make,
    floors={
        "forward": Floor(FLOPS, 3 * 4 * SIZE**2),
        "backward": Floor(FLOPS, 3 * 4 * SIZE**2),
        "both": Floor(2 * FLOPS, 5 * 4 * SIZE**2),
    },
    reference=product,
    peers={"fastpeft": product},
    settings={"tokens": SIZE},
)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": (2**12, 32)})


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., Outcome]:
    def run(*cases: OpCase, depth: str = "quick", peers: tuple[str, ...] = ()) -> Outcome:
        recorder = Recorder(RecordFile(tmp_path / "ops.jsonl", environment("cpu")), "bench", "cpu", depth)
        return Runner(recorder.add, "cpu", depth, 3, peers).run(cases)

    return run


def found(outcome: Outcome, metric: str, **settings: Any) -> dict[str, Record]:
    records = [r for r in outcome.records if r.metric == metric and settings.items() <= r.settings.items()]
    return {record.peer: record for record in records}


def test_every_direction_and_who_is_measured_twice(measure: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = measure(CASE)
    assert not outcome.failures and load(tmp_path / "ops.jsonl") == outcome.records
    for direction in ("forward", "backward", "both"):
        times = found(outcome, "time", direction=direction)
        assert set(times) == {"fastpeft", "torch", "torch again"}
        for record in times.values():
            assert len(record.samples) == 3 and record.unit == "ms" and record.error is not None
            assert record.error <= (record.budget or 0.0)
            floor = CASE.floors[direction]  # type: ignore[index]
            assert (record.settings["flops"], record.settings["bytes"]) == (floor.flops, floor.bytes)
            assert {"dtype": "float32", "tokens": SIZE, "depth": "quick"}.items() <= record.settings.items()
    peaks = found(outcome, "peak memory", direction="forward")
    assert peaks["torch"].median == SIZE**2 * 4 / 2**20 and "torch again" not in peaks
    rates = {r.case: r.unit for r in outcome.records if r.op == "ceiling"}
    assert rates == {"copy": "GB/s", "matrix float32": "TFLOP/s"}


def test_forward_and_backward_are_parts_of_both(measure: Callable[..., Outcome]) -> None:
    def slow(inputs: Inputs) -> Forward:
        x, w = inputs.tensors.values()

        def forward() -> tuple[torch.Tensor]:
            for _ in range(300):
                y = x.detach() @ w
            return (y + (x - x.detach()) @ w,)

        return forward

    outcome = measure(replace(CASE, peers={"fastpeft": slow}))
    parts = {each: found(outcome, "time", direction=each)["fastpeft"].median for each in CASE.floors}
    assert parts["backward"] < parts["forward"] / 5 and parts["both"] > parts["forward"] / 2


def test_wrong_numbers_get_no_time(measure: Callable[..., Outcome]) -> None:
    outcome = measure(replace(CASE, peers={"fastpeft": scaled(1.001), "liger": scaled(0.999)}))
    assert set(found(outcome, "time")) == {"torch", "torch again"}
    left = found(outcome, "left out")
    assert set(left) == {"fastpeft", "liger"} and "is over its budget" in left["liger"].settings["reason"]
    assert all((record.error or 0.0) > (record.budget or 0.0) > 0.0 for record in left.values())
    assert len(outcome.failures) == 1 and outcome.failures[0].startswith("product, 96 x 96, float32: fastpeft: Over")


def test_numbers_that_nearly_hold_get_a_time_and_a_mark(measure: Callable[..., Outcome]) -> None:
    """Of others than us: each result may use two budgets, and is about 1.5 of one, or 2.5, away from float64."""
    inputs = make("cpu", torch.float32, 0)
    true = truth(CASE, inputs, "cpu", 0)
    error, budget = true.deviation([torch.zeros(SIZE, SIZE), *true.same[1:]], times=math.inf)

    def off(budgets: float) -> Peer:
        return scaled(1.0 - budgets * budget / error)

    outcome = measure(replace(CASE, peers={"fastpeft": off(1.5), "liger": off(1.5), "unsloth": off(2.5)}))
    assert set(found(outcome, "left out")) == {"fastpeft", "unsloth"} and len(outcome.failures) == 1
    record = found(outcome, "time", direction="both")["liger"]
    assert record.error is not None and record.budget is not None and 1.2 < record.error / record.budget < 1.8
    assert record.over_budget == f"over budget: {record.error / record.budget:.2f}"
    assert table(outcome.records).count(f"    liger ({record.over_budget})") == 3
    files = {"a.jsonl": outcome.records}
    (row,) = (row for row in rows(files) if row.kind == "time" and row.what.direction == "both")
    assert record.over_budget in "".join(section([row])) and record.over_budget in site(files, [row])
    assert not any(other.over_budget for other in outcome.records if other.peer.startswith("torch"))


def test_a_wrong_gradient_gets_no_time(measure: Callable[..., Outcome]) -> None:
    def wrong(inputs: Inputs) -> Forward:
        x, w = inputs.tensors.values()
        return lambda: (x.detach() @ w + 0.999 * (x - x.detach()) @ w,)

    outcome = measure(replace(CASE, peers={"fastpeft": wrong}))
    assert len(outcome.failures) == 1 and "result 1: " in outcome.failures[0]


def test_peers_that_are_absent_or_broken_stop_nobody(measure: Callable[..., Outcome]) -> None:
    peers = {"fastpeft": product, "trl": absent, "liger": broken, "unsloth": scaled(1.0)}
    outcome = measure(replace(CASE, peers=peers))
    assert set(found(outcome, "time")) == {"fastpeft", "unsloth", "torch", "torch again"}
    reasons = {peer: record.settings["reason"] for peer, record in found(outcome, "left out").items()}
    assert reasons == {"trl": "no module named 'nowhere'", "liger": "RuntimeError: it broke"}
    assert not outcome.failures


def test_a_case_whose_numbers_differ_in_float64_fails(measure: Callable[..., Outcome]) -> None:
    case = replace(CASE, dtype=torch.bfloat16)  # drawn in fp32, rounded to bf16, but not for float64
    outcome = measure(case, CASE)
    assert len(outcome.failures) == 1 and "expected the numbers of torch.bfloat16 in float64 too" in outcome.failures[0]
    assert set(found(outcome, "time", dtype="float32")) == {"fastpeft", "torch", "torch again"}


def test_memory_that_runs_out_is_nobody_s_fault(measure: Callable[..., Outcome]) -> None:
    outcome = measure(replace(CASE, peers={"fastpeft": raising(torch.OutOfMemoryError("out of memory"))}))
    assert not outcome.failures and "out of memory" in found(outcome, "left out")["fastpeft"].settings["reason"]


def test_what_was_measured_stays_after_an_interruption(tmp_path: Path) -> None:
    recorder = Recorder(RecordFile(tmp_path / "ops.jsonl", environment("cpu")), "bench", "cpu", "quick")
    runner = Runner(recorder.add, "cpu", "quick", 3)
    with pytest.raises(KeyboardInterrupt):
        runner.run([CASE, replace(CASE, name="second", peers={"fastpeft": raising(KeyboardInterrupt())})])
    kept = load(tmp_path / "ops.jsonl")
    assert kept == runner.outcome.records and {"fastpeft"} <= set(found(runner.outcome, "time", direction="both"))
    assert f"product: {CASE.name}, float32, both" in table(kept)


def test_ceilings_are_measured_once_for_each_dtype(tmp_path: Path) -> None:
    recorder = Recorder(RecordFile(tmp_path / "ops.jsonl", environment("cpu")), "bench", "cpu", "quick")
    runner = Runner(recorder.add, "cpu", "quick", 3)
    for name in ("first", "second"):
        outcome = runner.run([replace(CASE, name=name)])
    assert [r.case for r in outcome.records if r.op == "ceiling"] == ["copy", "matrix float32"]
    assert {r.case for r in outcome.records} > {"first", "second"}


def test_named_peers_alone_are_measured(measure: Callable[..., Outcome]) -> None:
    outcome = measure(replace(CASE, peers={"fastpeft": product, "liger": product}), peers=("liger",))
    assert set(found(outcome, "time")) == {"liger", "liger again"}


def test_the_table_gives_ratios_and_shares_of_the_ceiling(measure: Callable[..., Outcome]) -> None:
    outcome = measure(CASE)
    lines = table(outcome.records).splitlines()
    assert lines[0].split()[-8:] == ["ms", "of", "ceiling", "peak", "MiB", "ours", "/", "it"]
    line = next(line for line in lines if line.startswith("    torch  "))
    ours, theirs = (found(outcome, "time", direction="forward")[peer] for peer in ("fastpeft", "torch"))
    rate = {r.case: max(r.samples) for r in outcome.records if r.op == "ceiling"}
    seconds = max(FLOPS / 1e12 / rate["matrix float32"], 3 * 4 * SIZE**2 / 1e9 / rate["copy"])
    ratio = median(a / b for a, b in zip(ours.samples, theirs.samples, strict=True))
    expected = ["torch", f"{theirs.median:.3f}", f"{seconds / theirs.median * 1e3:.0%}", "0.0", f"{ratio:.2f}"]
    assert line.split() == expected


def test_a_dtype_that_is_slower_than_fp32_has_the_ceiling_of_fp32() -> None:
    order = iter([1.0, 2.0, 8.0, 8.0, 2.0, 1.0, 1.0, 2.0, 8.0])  # of copy, fp32 and bf16; reversed every other round

    def clock(step: object) -> float:
        return next(order)

    rates = ceilings.measure("cpu", [torch.bfloat16], 1, clock)
    assert list(rates) == ["copy", "matrix float32", "matrix bfloat16"]
    assert rates["matrix bfloat16"] == rates["matrix float32"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("depth", ["quick", "default", "full"])
def test_every_op_has_cases_of_distinct_names(device: str, depth: str) -> None:
    for op, (words, cases) in ops().items():
        every = list(cases(device, depth))
        names = [(case.name, case.dtype) for case in every]
        assert every and words and len(set(names)) == len(names), op
        assert all(case.op == op and next(iter(case.peers)) == "fastpeft" for case in every), op
        assert all("torch" not in case.peers and case.floors for case in every), op
