"""Who wins: a candidate that is right and faster than the library by more than the noise; on a clock of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.tuning import clock, measuring
from fastpeft_kernels.tuning.measuring import Tunable, measure

CPU = torch.device("cpu")


class Key(NamedTuple):
    tokens: int

    def at(self, tokens: int, device: torch.device) -> Key:
        return Key(tokens)

    def smaller(self) -> Key:
        return Key(min(self.tokens, 4))


class Problem:
    """The square of random numbers; candidates are right, off by a share, not a number, or fail."""

    def __init__(self, key: Key, device: torch.device) -> None:
        self.x = torch.randn(key.tokens, 64)

    def run(self, candidate: str) -> list[Tensor]:
        if candidate == "fails":
            raise RuntimeError("no such\nkernel")
        y = self.x * self.x
        if candidate == "nan":
            y[0, 0] = float("nan")
        return [y * 1.0001 if candidate == "wrong" else y]

    def exact(self) -> list[Tensor]:
        return [self.x.double().square()]


def run(monkeypatch: pytest.MonkeyPatch, times: dict[str, list[float]], *extra: str) -> measuring.Measured:
    """What is measured when the clock shows these times."""

    def read(functions: Mapping[str, Callable[[], object]], device: torch.device, seconds: float) -> Any:
        return {name: times[name] for name in functions}

    monkeypatch.setattr(measuring, "interleaved_us", read)
    return measure(Tunable("op", Key, lambda _: (*times, *extra), Problem), Key(4), CPU)


def test_the_fastest_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, {"library": [10.0] * 8, "a": [9.0] * 8, "b": [8.0] * 8})
    assert found.winner is not None and found.winner.choice == "b" and not found.dropped
    assert found.winner.us == {"library": 10.0, "a": 9.0, "b": 8.0} and found.winner.case == (4,)


@pytest.mark.parametrize(
    "times",
    [
        [10.0] * 8,  # the same
        [9.85] * 8,  # less than 2 percent
        [8.0, 12.0] * 4,  # half of the time slower
        [5.0] * 5 + [10.5] * 3,  # the median by half, but not in three of four rounds
        [11.0] * 8,
    ],
)
def test_the_library_stays_unless_another_is_faster_by_more_than_the_noise(
    monkeypatch: pytest.MonkeyPatch, times: list[float]
) -> None:
    found = run(monkeypatch, {"library": [10.0] * 8, "a": times})
    assert found.winner is not None and found.winner.choice == "library"


def test_a_disturbed_machine_is_seen_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes ten times as long in some rounds: the ratio does not change."""
    library = [10.0, 100.0, 10.0, 70.0, 10.0, 40.0, 10.0, 10.0]
    found = run(monkeypatch, {"library": library, "a": [0.9 * time for time in library]})
    assert found.winner is not None and found.winner.choice == "a"


def test_wrong_results_and_failures_are_dropped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"library": [10.0] * 8, "right": [9.0] * 8}
    found = run(monkeypatch, times, "wrong", "nan", "fails")
    assert found.winner is not None and found.winner.choice == "right" and found.winner.us.keys() == times.keys()
    assert found.dropped.keys() == {"wrong", "nan", "fails"}
    assert found.dropped["fails"] == "RuntimeError: no such"
    assert found.dropped["wrong"].startswith("wrong: result 0 errs by")


def test_a_case_whose_library_fails_has_no_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, {"fails": [1.0], "a": [1.0]})
    assert found.winner is None and found.dropped == {"fails": "RuntimeError: no such"}


def test_a_failure_while_timing_is_the_outcome_of_that_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fail_late(self: Problem, candidate: str) -> list[Tensor]:
        calls.append(candidate)
        if candidate == "wrong":
            return [self.x]
        if len(calls) > 6:  # by then every candidate was found to be right
            raise torch.OutOfMemoryError("no memory left")
        return [self.x * self.x]

    monkeypatch.setattr(Problem, "run", fail_late)
    found = measure(Tunable("op", Key, lambda _: ("library", "wrong", "a"), Problem), Key(16), CPU, seconds=0.0)
    assert found.winner is None and found.dropped.keys() == {"wrong", "library"}
    assert found.dropped["library"] == "OutOfMemoryError: no memory left"


def test_generators_of_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    run(monkeypatch, {"library": [1.0] * 8})
    assert not seeded


def test_random_numbers_are_the_same_and_the_user_s_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(Problem, "exact", lambda self: seen.append(self.x) or [self.x.double().square()])
    before = torch.get_rng_state()
    for _ in range(2):
        run(monkeypatch, {"library": [1.0] * 8, "a": [1.0] * 8})
    assert torch.equal(seen[0], seen[1]) and torch.equal(before, torch.get_rng_state())


def test_the_clock_calls_in_turn_and_leaves_warm_up_out() -> None:
    calls: list[str] = []
    samples = clock.interleaved_us({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 0.0)
    assert {name: len(times) for name, times in samples.items()} == {"a": clock.FEWEST, "b": clock.FEWEST}
    assert "".join(calls[:8]) == "abbaabba" and len(calls) == 2 * (clock.FEWEST + clock.WARMUP)
    assert all(time > 0 for times in samples.values() for time in times)


def test_the_check_is_on_few_tokens_and_the_clock_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = Problem.run

    def run(self: Problem, candidate: str) -> list[Tensor]:
        sizes.append(len(self.x))
        return real(self, candidate)

    monkeypatch.setattr(Problem, "run", run)
    measure(Tunable("op", Key, lambda _: ("library", "a"), Problem), Key(16), CPU, seconds=0.0)
    assert sizes[:4] == [4, 16, 4, 16] and set(sizes[4:]) == {16}
