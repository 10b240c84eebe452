import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastpeft.bench import records
from fastpeft.bench.records import Environment, Record, RecordFile, append, environment, load
from tests.fresh import run_fresh


def fields(**changes: object) -> dict[str, object]:
    base = {"suite": "kernels_lora", "case": "r16 bf16", "op": "lora", "peer": "peft", "metric": "time", "unit": "ms"}
    return {**base, "samples": [3.0, 1.0, 2.0], "median": 2.0, "environment": asdict(environment()), **changes}


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "new" / "records.jsonl", environment())
    one = file.add(
        **{k: v for k, v in fields().items() if k not in ("median", "environment")},  # type: ignore[arg-type]
        settings={"rank": 16, "shapes": [[1, 2]]},
        error=1e-3,
        budget=2e-3,
    )
    two = file.add(suite="s", case="c", op="o", peer="fastpeft", metric="peak_memory", unit="MiB", samples=7)
    assert load(file.path) == [one, two]
    assert (one.median, two.samples, two.median) == (2.0, [7.0], 7.0)


def test_the_environment_says_where_and_with_what() -> None:
    env = environment()
    assert env.versions["torch"] == torch.__version__ or torch.__version__.startswith(env.versions["torch"])
    assert env.versions["fastpeft"]
    assert env.device and env.device_type == "cpu" and env.driver is None
    assert env.commit is None or len(env.commit) == 40
    assert len(env.date) == len("2026-01-01T00:00:00Z")


def test_a_commit_can_be_told_and_is_asked_of_git_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "_ROOT", tmp_path)
    env = environment(commit="abc")
    assert (env.commit, env.dirty) == ("abc", None)


def test_results_do_not_make_a_checkout_dirty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(records, "_ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.jsonl").write_text("")
    assert environment().dirty is False
    (tmp_path / "new.py").write_text("")
    env = environment()
    assert env.dirty is True and len(str(env.commit)) == 40


def test_without_a_gpu_there_is_no_gpu_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees none"):
        environment("cuda")
    with pytest.raises(ValueError, match="device_type: expected 'cpu' or 'cuda', got 'tpu'"):
        environment("tpu")


def test_the_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft_kernels.common import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(device, "device_capability", lambda _: 90)
    monkeypatch.setattr(device, "ptxas_version", {90: (13, 4)}.get)
    monkeypatch.setattr(records, "_answer", lambda *command: "580.65\n580.65" if command[0] == "nvidia-smi" else None)
    env = environment("cuda")
    assert (env.device, env.device_type, env.driver, env.ptxas) == ("NVIDIA H200", "cuda", "580.65", "13.4")
    assert env.cuda == torch.version.cuda


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"medium": 2.0}, ValueError, "medium: unknown key, did you mean 'median'"),
        ({"samples": [1.0, "2"]}, TypeError, r"samples\[1\]: expected float, got '2' \(str\)"),
        ({"samples": []}, ValueError, "samples: expected one or more finite numbers"),
        ({"samples": [float("nan")], "median": float("nan")}, ValueError, "samples: expected one or more finite"),
        ({"median": 3.0}, ValueError, "median: expected 2.0, the median of samples, got 3.0"),
        ({"schema": 2}, ValueError, "schema: expected 1, got 2"),
        ({"op": ""}, ValueError, "op: expected a name"),
        ({"peer": None}, TypeError, "peer: expected str, got null"),
        ({"error": "big"}, TypeError, r"error: expected float or null, got 'big' \(str\)"),
        ({"environment": {"device": "x"}}, ValueError, "environment.device_type: expected a value, got none"),
        ({"environment": []}, TypeError, r"environment: expected a mapping, got \[\] \(list\)"),
    ],
)
def test_invalid_records_are_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Record.from_dict(fields(**change))


def test_a_missing_key_is_named() -> None:
    data = fields()
    del data["unit"]
    with pytest.raises(ValueError, match="unit: expected a value, got none"):
        Record.from_dict(data)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    append(path, Record.from_dict(fields()))
    path.write_text(path.read_text() + json.dumps(fields(schema=9)) + "\n")
    with pytest.raises(ValueError, match=r"r.jsonl, line 2: schema: expected 1, got 9"):
        load(path)


def test_the_module_needs_nothing_that_it_measures() -> None:
    blocked = ("torch", "triton", "peft", "bitsandbytes", "transformers", "yaml")
    run_fresh("from fastpeft.bench.records import Record, environment\nenvironment()", blocked)


def test_environment_is_plain_data() -> None:
    assert Environment(**json.loads(json.dumps(asdict(environment()))))
