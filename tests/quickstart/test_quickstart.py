"""The quickstart as a user runs it, at a tiny size; in fresh processes alone only where one is interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from fastpeft.bench.records import Record
from fastpeft.cli import app
from fastpeft.quickstart import processes, worker
from tests.commands import Answer
from tests.commands import run as command
from tests.fresh import ROOT
from tests.processes import Forked

TINY = ["--steps", "4", "--batch-size", "4", "--sequence-length", "32", "--rank", "4", "--learning-rate", "5e-3"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def popen(command: list[str], *, stderr: IO[bytes], **options: Any) -> Any:
    """A worker's process without what importing costs."""
    if "fastpeft.quickstart.worker" not in command:
        return subprocess.Popen(command, stderr=stderr, **options)

    def work() -> int:
        os.dup2(stderr.fileno(), 2)
        sys.argv = command[2:]
        return worker.main()

    return Forked(work)


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """Workers are forked; what imports nothing of fastpeft has a fresh process still."""
    from fastpeft.quickstart import loading, training  # noqa: F401 (for all that they import)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(processes, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, forked: None) -> tuple[Answer, Path]:
    """One run with the shipped model on little text."""
    folder = tmp_path_factory.mktemp("quickstart")
    text = (ROOT / "fastpeft/quickstart/assets/text/train.txt").read_text()
    (folder / "train.txt").write_text(text[:6000])
    (folder / "held_out.txt").write_text(text[6000:7000])
    with (
        pytest.MonkeyPatch.context() as patched,
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
    ):
        patched.chdir(folder)
        code = app.run(["quickstart", *TINY, "--text", "train.txt", "--held-out", "held_out.txt", "--output", "out"])
    return Answer(code, out.getvalue(), err.getvalue()), folder


def test_it_ends_well(done: tuple[Answer, Path]) -> None:
    answer, _ = done
    assert (answer.code, answer.err) == (0, ""), answer.out


@pytest.mark.parametrize(
    "words",
    [
        "fastpeft verify: passed",
        "28 of 28 adapter layers accelerated",
        "plain PEFT: step 4/4, loss",
        "fastpeft: step 4/4, loss",
        "fastpeft / plain",
        "training speed (tokens/s)",
        "peak memory above the loaded model (MiB)",
        "kept for backward (MiB)",
        "held-out perplexity after",
        "Loss curves agree: largest |difference|",
        "Held-out perplexity fell by",
        "reloaded by plain peft in a fresh process",
        "out/report.json",
    ],
)
def test_it_shows(words: str, done: tuple[Answer, Path]) -> None:
    assert words in done[0].out


def test_the_report_holds_valid_records(done: tuple[Answer, Path]) -> None:
    report = json.loads((done[1] / "out/report.json").read_text())
    records = [Record.from_dict(record) for record in report["records"]]
    found = {(record.peer, record.metric): record for record in records}
    metrics = {"throughput", "step_time", "peak_memory", "kept_for_backward", "loss"}
    metrics |= {"perplexity_before", "perplexity_after"}
    assert set(found) == {(peer, metric) for peer in ("peft", "fastpeft") for metric in metrics}
    assert report["passed"] and report["verify_passed"] and report["curves_agree"] and report["perplexity_fell"]
    for peer in ("peft", "fastpeft"):
        assert len(found[peer, "loss"].samples) == 4
        assert len(found[peer, "step_time"].samples) == 3  # the first is not counted
        assert found[peer, "kept_for_backward"].median > 0
        assert found[peer, "throughput"].settings["sequence_length"] == 32
    assert found["peft", "loss"].samples[0] == pytest.approx(found["fastpeft", "loss"].samples[0], rel=1e-5)
    assert found["peft", "perplexity_before"].median == pytest.approx(found["fastpeft", "perplexity_before"].median)


def test_the_picture_and_the_adapter_are_there(done: tuple[Answer, Path]) -> None:
    assert (done[1] / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((done[1] / "out/adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (done[1] / "out/adapter/adapter_model.safetensors").stat().st_size > 0


def test_ctrl_c_ends_the_worker_too(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "fastpeft", "quickstart", *TINY, "--output", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "verify: loading the model\n"
    worker = int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)]).split()[0])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "fastpeft: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "quickstart", "--model", "./no/such/model", "--output", str(tmp_path))
    message = "--model: expected a model's folder or its ID on the hub, got './no/such/model', which is neither"
    assert (answer.code, answer.err) == (2, f"fastpeft: {message}\n")


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "quickstart", "--model", str(tmp_path))
    message = f"--model: expected a folder with a config.json, got {tmp_path}"
    assert (answer.code, answer.err) == (2, f"fastpeft: {message}\n")


def test_an_empty_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("some.txt").write_text("some")
    answer = command(capsys, "quickstart", "--text", "empty.txt", "--held-out", "some.txt")
    message = "--text: expected some text, got an empty file: empty.txt"
    assert (answer.code, answer.err) == (2, f"fastpeft: {message}\n")
    assert not Path("runs").exists()


def test_a_text_shorter_than_a_block_is_found_by_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some.txt").write_text("some text")
    answer = command(capsys, "quickstart", "--text", "some.txt", "--held-out", "some.txt")
    message = "--text: expected at least --sequence-length 256 tokens, got "
    assert answer.code == 2
    assert answer.err.startswith(f"fastpeft: {message}") and answer.err.count("\n") == 1


@pytest.mark.full
def test_as_shipped_it_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastpeft", "quickstart", "--output", str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    fall = re.search(r"Held-out perplexity fell by (\d+)%", process.stdout)
    assert fall is not None and int(fall[1]) >= 15
