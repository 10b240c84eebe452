"""Suites of pytest-benchmark over the cases of `fastpeft bench`: pytest benchmarks --benchmark-only [--depth default]

A test is one case in one direction. All peers that hold the case's error budget, or nearly do, take a turn in every
round, so what pytest-benchmark times is a round; the milliseconds of each peer are in the benchmark's extra_info.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpeft.bench.ops.case import DIRECTIONS, Direction, OpCase
from fastpeft.bench.ops.finding import ops
from fastpeft.bench.ops.run import ROUNDS, Fit, Runner
from fastpeft.bench.recorder import Recorder
from fastpeft.bench.records import RecordFile, environment
from fastpeft.bench.timer import interleaved

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of the module's OP, in each of its directions."""
    if "case" in metafunc.fixturenames:
        _, cases = ops()[metafunc.module.OP]
        found = list(cases(DEVICE, metafunc.config.getoption("--depth")))
        pairs = [(case, direction) for case in found for direction in DIRECTIONS if direction in case.floors]
        names = [f"{case.name}, {str(case.dtype).removeprefix('torch.')}, {direction}" for case, direction in pairs]
        metafunc.parametrize("case, direction", pairs, ids=names)


@pytest.fixture(scope="session")
def runner(pytestconfig: pytest.Config) -> Runner:
    depth = pytestconfig.getoption("--depth")
    return Runner(Recorder(RecordFile(os.devnull, environment(DEVICE)), "bench", DEVICE, depth).add, DEVICE, depth)


@pytest.fixture(scope="session")
def last() -> dict[str, Any]:
    """The case that was checked last, and its peers: the next test is mostly another direction of it."""
    return {}


@pytest.fixture
def beside_peers(
    benchmark: Any, runner: Runner, last: dict[str, Any], pytestconfig: pytest.Config
) -> Callable[[OpCase, Direction], None]:
    """Measures a case in a direction; fails where fastpeft's own numbers are off."""

    def measure(case: OpCase, direction: Direction) -> None:
        if last.get("case") is not case:
            last.clear()
            runner.outcome.failures.clear()
            runner.outcome.records.clear()
            last["peers"] = runner.fitting(case)
            last["case"] = case
        peers: dict[str, Fit] = last["peers"]
        turns = {name: peer.turns(direction) for name, peer in peers.items()}
        samples: dict[str, list[float]] = {name: [] for name in turns}

        def take_turns() -> None:
            names = list(turns) if len(samples[next(iter(turns))]) % 2 == 0 else list(reversed(turns))
            for name, taken in interleaved({n: turns[n] for n in names}, 1, 0, DEVICE, runner.clock).items():
                samples[name] += taken

        warmup, rounds = 2, ROUNDS[pytestconfig.getoption("--depth")]
        benchmark.group = f"{case.op}: {case.name}"
        benchmark.pedantic(take_turns, rounds=rounds, warmup_rounds=warmup)
        floor = case.floors[direction]
        left_out = {record.peer: record.settings["reason"] for record in runner.outcome.records}
        dtype = str(case.dtype).removeprefix("torch.")
        benchmark.extra_info.update(
            case.settings, dtype=dtype, direction=direction, flops=floor.flops, bytes=floor.bytes,
            over_budget={name: share for name, peer in peers.items() if (share := peer.deviation.share) > 1.0},
            ms={name: taken[warmup:] for name, taken in samples.items()}, left_out=left_out,
        )  # fmt: skip
        assert not runner.outcome.failures

    return measure
