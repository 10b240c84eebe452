from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from fastpeft.bench.records import Record, append
from fastpeft.bench.report.command import main
from fastpeft.bench.report.compare import Comparison, compare

from .made_records import environment, noisy, record


def between(before: Iterable[Record], after: Iterable[Record], peers: Iterable[str] = ()) -> Comparison:
    return compare({"a.jsonl": list(before)}, {"b.jsonl": list(after)}, peers)


def many(seed: int, planted: float = 1.0, spread: float = 0.03) -> list[Record]:
    """Forty cases of noise; the last is slower by `planted`."""
    return [
        record(noisy(5.0 * (planted if i == 39 else 1.0), 1000 * seed + i, spread), case=f"case {i}") for i in range(40)
    ]


def write(path: Path, records: Iterable[Record]) -> str:
    for each in records:
        append(path, each)
    return str(path)


@pytest.mark.parametrize("spread", [0.01, 0.03, 0.1])
def test_noise_is_no_regression(spread: float) -> None:
    result = between(many(1, spread=spread), many(2, spread=spread))
    assert len(result.pairs) == 40 and not [pair for pair in result.pairs if pair.regressed(1.1)]


def test_a_planted_regression_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / name, records) for name, records in (("a", many(1)), ("b", many(2, planted=1.3)))]
    assert main(["compare", *files]) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "worse by more than 1.1, beyond the noise: 1" and "fastpeft, ops, lora: case 39: " in second
    assert main(["compare", *files, "--threshold", "1.5"]) == 0
    assert main(["compare", *reversed(files)]) == 0
    assert "better by as much: 1" in capsys.readouterr().out


def test_less_speed_is_worse_and_less_memory_is_better() -> None:
    rate, memory = {"metric": "speed", "unit": "tokens/s"}, {"metric": "peak memory", "unit": "MiB"}
    result = between(
        [record([4.0] * 5, **rate), record([4.0] * 5, **memory)],
        [record([2.0] * 5, **rate), record([2.0] * 5, **memory)],
    )
    assert [(pair.what.metric, pair.worse, pair.bound) for pair in result.pairs] == [
        ("speed", 2.0, (2.0, 2.0)),
        ("peak memory", 0.5, (0.5, 0.5)),
    ]


def test_a_peer_that_differs_from_itself_widens_the_bound() -> None:
    def times(ours: float, again: float) -> list[Record]:
        others = [record([4.0] * 5, peer="peft"), record([again] * 5, peer="peft again")]
        return [record([ours] * 5), *others]

    def found(again: float) -> bool:
        return between(times(4.0, 4.0), times(5.2, again), ["fastpeft"]).pairs[0].regressed(1.1)

    assert found(4.0) and not found(4.0 * 1.4) and not found(4.0 / 1.4)


def test_few_samples_decide_nothing() -> None:
    (pair,) = between([record([1.0, 1.0])], [record([9.0] * 9)]).pairs
    assert pair.bound is None and pair.unknown(1.1) and not pair.regressed(1.1)


def test_of_figures_measured_twice_the_newest_is_taken() -> None:
    later = environment(date="2027-01-01T00:00:00Z")
    (pair,) = between([record([1.0], later), record([5.0])], [record([1.0])]).pairs
    assert pair.worse == 1.0


def test_direction_and_dtype_are_not_mixed() -> None:
    def both(forward: float, backward: float) -> list[Record]:
        return [
            record([t], settings={"direction": d, "dtype": "float32"})
            for d, t in (("forward", forward), ("backward", backward))
        ]

    pairs = between(both(1.0, 2.0), both(1.0, 4.0)).pairs
    assert [(pair.what.direction, pair.worse) for pair in pairs] == [("backward", 2.0), ("forward", 1.0)]


def test_what_differs_and_what_is_gone_is_said() -> None:
    new = environment(versions={"torch": "2.13", "peft": "0.21"}, driver="580", dirty=True)
    old_ones = [record(settings={"threads": 1}), record(peer="liger")]
    left_out = record([1.0], new, peer="liger", metric="left out", unit="1", settings={"reason": "not installed"})
    result = between(
        old_ones, [record([2.0], new, settings={"threads": 2}), left_out, record([1.0], new, case="other")]
    )
    assert result.remarks == [
        "driver: none -> 580",
        "peft: none -> 0.21",
        "torch: 2.11 -> 2.13",
        "measured with uncommitted changes: B",
        "threads: 1 -> 2 in 1 pairs",
        "left out now: liger, lora: one: not installed",
    ]
    assert [peer for _, peer in result.gone] == ["liger"] and [what.case for what, _ in result.new] == ["other"]


def test_other_devices_are_not_compared() -> None:
    with pytest.raises(ValueError, match="of fastpeft that both sets have, got none: device: Some GPU -> Other"):
        between([record()], [record(where=environment(device="Other"))], ["fastpeft"])


def test_the_command_gives_json_and_clear_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path / name, [record([t] * 3, case="a\n\x1b[31mb")]) for name, t in (("a", 1.0), ("b", 2.0)))
    assert main(["compare", a, b, "--json"]) == 1
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert (pair["verdict"], pair["worse"], pair["what"]["case"]) == ("regression", 2.0, "a\n\x1b[31mb")
    assert main(["compare", a, b]) == 1 and "\x1b" not in capsys.readouterr().out
    assert main(["compare", a, b, "--peer", "peft"]) == 2
    assert "error: records: expected a figure of peft that both sets have" in capsys.readouterr().err
    (tmp_path / "c").write_text("{")
    assert main(["compare", a, str(tmp_path / "c")]) == 2 and "c, line 1" in capsys.readouterr().err
    for wrong in ("0.5", "nan", "inf", "x"):
        with pytest.raises(SystemExit) as left:
            main(["compare", a, b, "--threshold", wrong])
        assert left.value.code == 2 and f"expected a number of at least 1, got {wrong}" in capsys.readouterr().err
