"""The loss beside its peers: measured, in agreement, and made a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.bench import losses
from fastpeft.bench.records import load
from fastpeft.bench.tables import losses_table


def test_a_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "losses.jsonl"
    cases = [losses.LossCase(8, 16, 300, trained) for trained in (False, True)]
    assert losses.main(["--rounds", "1", "--threads", "1", "--out", str(out)], cases) == 0
    assert capsys.readouterr().out.count("of plain") == 2
    table = losses_table(load(out))
    assert "| 8 x 16, 300 words, trained head | " in table and "medians of 1 interleaved rounds" in table


def test_peers_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_fastpeft", lambda hidden, weight, labels: 2 * losses._plain(hidden, weight, labels))
    with pytest.raises(AssertionError, match="8 x 16, 300 words, frozen head: fastpeft deviates by"):
        losses.measure(losses.LossCase(8, 16, 300, False), 1)
