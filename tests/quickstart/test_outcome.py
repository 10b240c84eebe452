"""What the quickstart makes of two runs: here without running any."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpeft.bench.records import Record, environment
from fastpeft.progress import stage
from fastpeft.quickstart import comparing, curves
from fastpeft.quickstart.outcome import Outcome, Run
from fastpeft.quickstart.processes import WorkerError, run_worker
from fastpeft.quickstart.settings import Settings, checked_settings

RUN = Run([4.0, 3.0, 2.0], [0.5, 0.25], 100.0, "a method", 10.0, 50.0, 20.0, 1)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    options: dict[str, Any] = dict(steps=3, batch_size=2, sequence_length=8, rank=4, quantization="nf4", dtype="auto")
    return checked_settings(
        model=None, text=None, held_out=None, output=tmp_path / "out", learning_rate=1e-3, seed=0, **options
    )


def verified(passed: bool = True) -> dict[str, Any]:
    return {
        "passed": passed,
        "table": "fastpeft verify: its table",
        "accelerated": "all",
        "architecture": "Tiny",
        "parameters": 1000,
        "trainable": 10,
        "blocks": 3,
        "dtype": "float32",
        "environment": asdict(environment("cpu")),
    }


def outcome(settings: Settings, fast: Run = RUN, verify_passed: bool = True) -> Outcome:
    agreement = curves.compare(RUN.losses, fast.losses, "float32")
    return Outcome(settings, RUN, fast, agreement, verified(verify_passed))


def test_curves_that_agree() -> None:
    agreement = curves.compare([4.0, 2.0, 3.0], [4.0, 2.0001, 3.0], "float32")
    assert agreement.passed and agreement.step == 2
    assert agreement.largest == pytest.approx(1e-4) and agreement.relative == pytest.approx(5e-5)


@pytest.mark.parametrize(("dtype", "passed"), [("float32", False), ("bfloat16", True), ("float16", True)])
def test_what_is_allowed_follows_the_dtype(dtype: str, passed: bool) -> None:
    assert curves.compare([4.0, 2.0], [4.0, 2.002], dtype).passed is passed


@pytest.mark.parametrize("fast", [[1.0], []])
def test_curves_of_unequal_length(fast: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^fast: expected 2 losses"):
        curves.compare([1.0, 2.0], fast, "float32")


def test_an_outcome_passes_only_if_all_is_well(settings: Settings) -> None:
    assert outcome(settings).passed
    assert not outcome(settings, verify_passed=False).passed
    assert not outcome(settings, replace(RUN, losses=[4.0, 3.1, 2.0])).passed
    assert not outcome(settings, replace(RUN, perplexity_after=50.0)).passed


def test_records_keep_every_sample(settings: Settings) -> None:
    records = {(record.peer, record.metric): record for record in outcome(settings).records()}
    assert records["fastpeft", "throughput"].samples == [32.0, 64.0]
    assert records["fastpeft", "loss"].samples == RUN.losses and records["fastpeft", "loss"].error == 0.0
    assert records["peft", "peak_memory"].settings["method"] == "a method"
    assert all(Record.from_dict(record.to_dict()) == record for record in records.values())


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (RUN, None),
        (replace(RUN, losses=[1.0, float("nan"), 1.0]), "the loss of step 2 is nan"),
        (replace(RUN, perplexity_after=float("inf")), "the held-out perplexity afterwards is inf"),
    ],
)
def test_divergence(run: Run, found: str | None) -> None:
    assert run.diverged == found


@pytest.mark.parametrize(
    ("seconds", "disturbed"), [([0.5, 0.55] * 20, False), ([0.5, 0.9] * 20, True), ([0.5, 0.9], False)]
)
def test_a_machine_that_does_something_else_is_noticed(seconds: list[float], disturbed: bool) -> None:
    assert replace(RUN, step_seconds=seconds).disturbed is disturbed


@pytest.mark.parametrize(
    ("fast", "generated_with_fastpeft", "result", "words"),
    [
        (RUN, False, True, "Loss curves agree"),
        (RUN, True, False, "reloaded WITH fastpeft loaded"),
        (replace(RUN, losses=[4.0, 3.1, 2.0]), False, False, "Loss curves DISAGREE"),
        (replace(RUN, perplexity_after=60.0), False, False, "DID NOT FALL"),
    ],
)
def test_the_end_of_a_quickstart(
    fast: Run,
    generated_with_fastpeft: bool,
    result: bool,
    words: str,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = {"verify": verified(), "plain": asdict(RUN), "accelerated": asdict(fast)}
    generated = {"base": "once", "tuned": "twice", "loaded_fastpeft": generated_with_fastpeft}
    monkeypatch.setattr(comparing, "run_worker", lambda task, settings, listener: results[task])
    monkeypatch.setattr(comparing, "run_generation", lambda request, settings: generated)
    shown = io.StringIO()
    assert comparing.run(settings, Console(file=shown, width=100)) is result
    assert words in shown.getvalue()
    assert (Path(settings.output) / "report.json").exists() and (Path(settings.output) / "loss.png").exists()


def test_a_run_that_diverged_is_said_and_fails(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = asdict(replace(RUN, losses=[4.0, float("nan"), 2.0]))
    results = {"verify": verified(), "plain": broken, "accelerated": broken}
    monkeypatch.setattr(comparing, "run_worker", lambda task, settings, listener: results[task])
    assert comparing.run(settings, Console(file=io.StringIO())) is False
    assert capsys.readouterr().err == "fastpeft: plain PEFT: the loss of step 2 is nan; try a lower --learning-rate\n"


def test_a_worker_that_fails_shows_the_end_of_its_log(settings: Settings) -> None:
    (Path(settings.output) / "logs").mkdir(parents=True)
    with pytest.raises(WorkerError, match=r"(?s)no_such_task ended with exit code 1; the end of .*KeyError"):
        run_worker("no_such_task", settings, lambda event: None)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_and_elsewhere(terminal: bool) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=100, force_terminal=terminal)
    with stage(console, "plain PEFT", 20) as listener:
        listener({"event": "status", "text": "training"})
        for step in range(1, 21):
            listener({"event": "step", "step": step, "steps": 20, "loss": 1.0})
    if terminal:
        assert "20/20" in shown.getvalue()
    else:
        lines = shown.getvalue().splitlines()
        assert len(lines) == 11 and lines[0] == "plain PEFT: training"
        assert lines[1].startswith("plain PEFT: step 2/20, loss 1.000")
