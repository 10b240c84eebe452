"""Every example runs, at tiny size: the YAML files through `fastpeft train`, the scripts as they are."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastpeft.cli import app
from fastpeft.config import FastpeftConfig
from tests.fresh import ROOT

from .tiny import EXAMPLES

SCRIPTS = {
    "chat": "decoder",
    "embeddings": "encoder",
    "instructions": "decoder",
    "masked": "encoder",
    "preferences": "decoder",
    "texts": "decoder",
    "topics": "encoder",
    "translation": "encoder-decoder",
}
"""The kind of model that each is for."""
STRATEGIES = {"domain": "decoder", "domain-masked": "encoder", "domain-spans": "encoder-decoder", "reviews": "encoder"}
STRATEGIES |= {
    "dynamic": "decoder",
    "few-shot": "encoder",
    "few-shot-pattern": "encoder",
    "few-shot-answers": "encoder-decoder",
    "distillation": "decoder",
    "distillation-masked": "encoder",
    "distillation-translation": "encoder-decoder",
}
TASKS = {"multi-task": "encoder", "multi-task-prompts": "decoder"}
"""Several data sets each; tests/strategies/test_multi_task.py runs the like of both."""
HEADS = {"letters": "encoder", "names": "encoder", "questions": "encoder"}
"""Those that are YAML files alone; tests/training/test_heads.py runs the like of the second."""
ALONE = {"embeddings": "sentence_transformers", "preferences": "trl"}
"""Scripts without a YAML file, and the package that each is for."""
RUNS = {name: kind for name, kind in (SCRIPTS | STRATEGIES | TASKS | HEADS).items() if name not in ALONE}
"""What `fastpeft train` does."""
FULL = {*HEADS, "domain-masked", "few-shot-pattern", "few-shot-answers", "reviews"}
FULL |= {"distillation-masked", "distillation-translation", "dynamic"}
CHANGES = {
    "few-shot-pattern": [  # words that are one token each of a tiny vocabulary
        *("--strategy.options.pattern", "'{text}\n{answer}\n'"),
        *("--strategy.options.verbaliser", '{delivery: "1", invoice: "2", product: "3", returns: "4"}'),
    ]
}
"""What an example needs with a tiny model."""
WITHOUT_LORA = {"few-shot-answers"}
FULL |= {*TASKS}

COMPARISON = "compare"
"""Runs through `fastpeft compare`."""

ModelOf = Callable[[str], Path]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Examples are started in the checkout; nothing is fetched, and nothing left behind."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in RUNS])
def test_the_configuration(name: str, model_of: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    changes = ["--model.name", str(model_of(RUNS[name])), "--output-dir", str(folder), "--max-steps", "2"]
    changes += CHANGES.get(name, [])
    assert app.run(["train", f"examples/{name}.yaml", "--quiet", *changes]) == 0, capsys.readouterr().err
    assert "2 steps, loss " in capsys.readouterr().out
    parts = FastpeftConfig.from_yaml(EXAMPLES / f"{name}.yaml").strategy.options.get("tasks", ["."])
    assert all((folder / part / "adapter_model.safetensors").is_file() for part in parts)
    if name not in WITHOUT_LORA:
        all_accelerated((folder / "report.md").read_text())


def test_the_comparison(model_of: ModelOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--model.name", str(model_of("encoder")), "--output-dir", str(tmp_path / "run"), "--steps", "2"]
    few = ["--methods", "head", "--rates", "1", "--seeds", "1"]
    assert app.run(["compare", f"examples/{COMPARISON}.yaml", "--quiet", *changes, *few]) == 0, capsys.readouterr().err
    assert "| head only | 0.00548 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script(
    name: str,
    model_of: ModelOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(ALONE.get(name, "transformers"))
    folder = tmp_path / "run"
    options = ["--model", str(model_of(SCRIPTS[name])), "--max-steps", "2", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (folder / "adapter_model.safetensors").is_file()
    assert "fastpeft" not in (folder / "adapter_config.json").read_text().replace(str(model_of(SCRIPTS[name])), "")
    all_accelerated(capsys.readouterr().out)


@pytest.mark.full
def test_the_chat_script_in_two_processes(model_of: ModelOf, tmp_path: Path) -> None:
    # what `accelerate launch --num_processes 2` runs where there are two GPUs
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--model", str(model_of("decoder")), "--max-steps", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "examples/chat.py", *options],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert done.stdout.count("28 of 28 adapter layers accelerated") == 2
    all_accelerated(done.stdout)


def all_accelerated(printed: str) -> None:
    """Fails unless every adapter layer is accelerated, and none of its calls left to PEFT."""
    (done, layers), *_ = re.findall(r"fastpeft: (\d+) of (\d+) adapter layers accelerated", printed)
    assert 0 < int(done) == int(layers), printed
    assert "by PEFT" not in printed and "PEFT's own forward" not in printed, printed


class TestWhatIsThere:
    def test_every_file_has_a_test_and_a_line(self) -> None:
        table = (EXAMPLES / "README.md").read_text()
        assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
        assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*RUNS, COMPARISON}
        for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.yaml")]:
            assert f"examples/{path.name}" in table
        for path in (EXAMPLES / "data").glob("*.*l"):
            assert f"`{path.name}`" in (EXAMPLES / "data" / "README.md").read_text()

    def test_every_file_that_the_table_names(self) -> None:
        table = (EXAMPLES / "README.md").read_text()
        named = re.findall(r"\b(?:examples|notebooks|docs)/[\w./-]+\w", table)
        assert named and not [name for name in named if not (ROOT / name).exists()]

    @pytest.mark.parametrize("name", [*RUNS, COMPARISON])
    def test_a_configuration_says_nothing_twice(self, name: str) -> None:
        """Defaults are left out but for those that readers look for."""
        config = FastpeftConfig.from_yaml(EXAMPLES / f"{name}.yaml")
        paths = [task["path"] for task in config.strategy.options.get("tasks", {}).values()] or [config.data.path]
        assert all(path.startswith("examples/data/") for path in paths)
        assert config.training.output_dir == f"runs/{name}"
        given = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
        default = FastpeftConfig().to_dict()
        shown = {"method", "lora.r", "lora.alpha", "data.max_length", "training.learning_rate", "strategy.name"}
        shown |= {"training.per_device_train_batch_size"}
        for section, values in given.items():
            for key, value in values.items() if isinstance(values, dict) else ():
                assert f"{section}.{key}" in shown or default[section][key] != value, f"{section}.{key}"

    @pytest.mark.parametrize("path", sorted((EXAMPLES / "data").glob("*.*[lv]")), ids=lambda path: path.name)
    def test_the_data(self, path: Path) -> None:
        """Rows that differ, as many as the table says, with the columns that it names."""
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else None
        rows = rows or [json.loads(line) for line in text.splitlines()]
        assert 20 <= len(rows) <= 60 and len({json.dumps(row) for row in rows}) == len(rows)
        columns = ", ".join(f"`{name}`" for name in rows[0])
        table = (EXAMPLES / "data" / "README.md").read_text()
        assert f"| `{path.name}` | {len(rows)} | {columns} |" in table
        assert all(row.keys() == rows[0].keys() and all(row.values()) for row in rows)
