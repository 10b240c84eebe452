"""What an optimizer's step takes."""

from __future__ import annotations

import pytest

from fastpeft.bench import optimizer


@pytest.fixture(autouse=True)
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes longer than all else."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_foreach_needs_a_copy_that_fused_ones_do_not() -> None:
    found = optimizer.measure(layers=1, rank=2, rounds=1)
    trained = sum(2 * (into + out) * 4 for into, out in optimizer.FEATURES)
    counts = 4 * 2 * len(optimizer.FEATURES)
    assert found.temporary["torch, foreach"] > trained
    assert found.temporary["torch, fused"] < 0.01 * trained and found.temporary["fastpeft"] < 0.01 * trained
    assert found.state["fastpeft"] == found.state["torch, fused"] == 2 * trained + counts


def test_the_host_does_less(capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizer.main(["--layers", "8", "--rounds", "5", "--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    host = {line[:28].strip(): float(line[28:37]) for line in lines[1:]}
    assert host["fastpeft"] < 0.7 * host["torch, fused"] < host["torch, loop"]
