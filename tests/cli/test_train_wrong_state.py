"""`fastpeft train` where something is missing, cannot be reached, or is not what the run to resume began with."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpeft import hub
from fastpeft.cli import app
from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.training.folder import begin, check_same
from tests.checkpoints import Checkpoints, write_rows
from tests.commands import Answer, run

from .wrong import contents

ROWS = [{"text": f"some words, and {number} more"} for number in range(6)]


def one_line(answer: Answer) -> str:
    """The message of a wrong command line."""
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1), answer
    return answer.err.removeprefix("fastpeft: ").removesuffix("\n")


@pytest.fixture
def good(tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that would train."""
    monkeypatch.chdir(tmp_path)
    return ["train", "--quiet", "--model", checkpoints["llama"], "--data", write_rows("texts.jsonl", *ROWS)]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("datasets", 'reading data needs datasets, which is not installed: pip install "fastpeft[train]"'),
        ("trl", 'training decoders needs trl, which is not installed: pip install "fastpeft[train]"'),
        ("matplotlib", 'the loss curve needs matplotlib, which is not installed: pip install "fastpeft[train]"'),
        ("bitsandbytes", "model.quantization: nf4 needs bitsandbytes: pip install bitsandbytes"),
    ],
)
def test_a_package_that_is_not_installed(
    module: str,
    message: str,
    good: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    before = contents(tmp_path)
    assert one_line(run(capsys, *good, "--method", "qlora")) == message
    assert contents(tmp_path) == before


def cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def of_another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def with_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (cut_off, " could not be loaded: Error while deserializing header: "),
        (lambda folder: (folder / "model.safetensors").unlink(), " could not be loaded: it has no weights in "),
        (of_another_width, " could not be loaded: its weights have other shapes than its config.json says"),
        (with_more_layers, " has no values for model.layers.2.input_layernorm, "),
    ],
    ids=["cut off", "missing", "of another width", "with more layers"],
)
def test_weights_that_cannot_be_used(
    breaks: Callable[[Path], None],
    message: str,
    good: list[str],
    checkpoints: Checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["llama"], broken)
    breaks(broken)
    before = contents(tmp_path)
    assert one_line(run(capsys, *good, "--model", str(broken))).startswith(f"model.name: {broken}{message}")
    assert contents(tmp_path) == before


class TestHub:
    """Without a network."""

    @pytest.fixture(autouse=True)
    def unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub._ask.cache_clear()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (
                "--model some/model",
                "model.name: some/model is no local folder, and http://127.0.0.1:9 cannot be reached: ",
            ),
            ("--data some/rows", "data.path: some/rows is no local file, and http://127.0.0.1:9 cannot be reached: "),
            ("--eval-path some/rows", "data.eval_path: some/rows is no local file, and http://127.0.0.1:9 cannot be "),
        ],
    )
    def test_what_is_not_here_is_not_waited_for(
        self, more: str, message: str, good: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = time.monotonic()
        assert one_line(run(capsys, *good, *more.split())).startswith(message)
        assert time.monotonic() - start < 5

    def test_what_was_fetched_earlier_will_do(
        self, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fastpeft.config import ModelSection
        from fastpeft.models import bases

        snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
        shutil.copytree(checkpoints["llama"], snapshot)
        (tmp_path / "models--some--model" / "refs").mkdir()
        (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        model = ModelSection(name="some/model")
        start = time.monotonic()
        assert bases.load_config(model).hidden_size == 64
        assert bases.load_tokenizer(model).eos_token == "<|eos|>"
        assert time.monotonic() - start < 5

    def test_pushing_is_told_before_training(
        self, good: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        message = "training.push_to_hub: expected to be logged in to the hub: run hf auth login"
        assert one_line(run(capsys, *good, "--push-to-hub")) == message
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_some")
        message = "training.push_to_hub: http://127.0.0.1:9 cannot be reached: "
        assert one_line(run(capsys, *good, "--push-to-hub")).startswith(message)


class TestResume:
    """Of a run of two steps out of six rows."""

    @pytest.fixture(scope="class")
    @classmethod
    def begun(cls, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("begun")
        rows = write_rows(folder / "texts.jsonl", *ROWS)
        settings = ["--model", checkpoints["llama"], "--data", rows, "--batch-size", "2", "--max-steps", "2"]
        assert app.run(["train", "--quiet", *settings, "--output-dir", str(folder / "run")]) == 0
        return folder

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("--lora.r 8", "lora.r: expected 16, as the run to resume has it, got 8"),
            ("--learning-rate 1", "training.learning_rate: expected 0.0002, as the run to resume has it, got 1.0"),
            ("--batch-size 3", "training.per_device_train_batch_size: expected 2, as the run to resume has it, got 3"),
            ("--limit 4", "data.limit: expected null, as the run to resume has it, got 4"),
            (
                "--target-modules [q_proj]",
                "lora.target_modules: expected all-linear, as the run to resume has it, got [q_proj]",
            ),
            (
                "--lora.extra.lora_bias true",
                "lora.extra.lora_bias: expected null, as the run to resume has it, got true",
            ),
        ],
    )
    def test_other_settings_are_refused(
        self, more: str, message: str, begun: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = contents(begun)
        answer = run(capsys, "train", "--quiet", "--resume", "--output-dir", str(begun / "run"), *more.split())
        assert one_line(answer) == message
        assert contents(begun) == before

    @pytest.mark.parametrize(
        ("key", "value", "shown"),
        [
            ("training.extra", "{adam_beta2: 0.9, neftune_noise_alpha: 5}", "training.extra.neftune_noise_alpha: 5"),
            ("lora.extra", "{rank_pattern: {q_proj: 4}}", "lora.extra.rank_pattern.q_proj: 4"),
            ("data.columns", "{text: text}", "data.columns.text: text"),
        ],
    )
    def test_settings_that_were_taken_out_are_missed(self, key: str, value: str, shown: str, tmp_path: Path) -> None:
        before = FastpeftConfig().override([f"{key}={value}"])
        begin(tmp_path, before, "0", 1)
        check_same(before, tmp_path)
        name, _, was = shown.partition(": ")
        kept = {"training.extra": "{adam_beta2: 0.9}"}.get(key, "{}")
        with pytest.raises(
            UserError, match=f"^{re.escape(name)}: expected {was}, as the run to resume has it, got null$"
        ):
            check_same(FastpeftConfig().override([f"{key}={kept}"]), tmp_path)

    def test_a_configuration_that_cannot_be_read(
        self, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(begun / "run", folder)
        config = shutil.copy(folder / "config.yaml", tmp_path / "own.yaml")
        (folder / "config.yaml").write_text("lora: [")
        answer = run(capsys, "train", "--quiet", str(config), "--resume", "--output-dir", str(folder))
        assert one_line(answer).startswith(
            f"--resume: {folder}/config.yaml cannot be read: config.yaml: not valid YAML"
        )

    def test_another_number_of_processes_is_refused(
        self, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(begun / "run", folder)
        assert (folder / "processes.txt").read_text() == "1\n"
        (folder / "processes.txt").write_text("2\n")
        answer = run(capsys, "train", "--quiet", "--resume", "--output-dir", str(folder))
        assert one_line(answer) == "--resume: expected 2 processes, as the run to resume has them, got 1"

    def test_other_rows_are_refused(self, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
        texts = (begun / "texts.jsonl").read_text()
        try:
            write_rows(begun / "texts.jsonl", *ROWS[:-1], {"text": "other words"})
            answer = run(capsys, "train", "--quiet", "--resume", "--output-dir", str(begun / "run"))
        finally:
            (begun / "texts.jsonl").write_text(texts)
        assert one_line(answer) == "data.path: expected the rows that the run to resume began with, got others"

    def test_a_run_is_not_replaced_unasked(self, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = begun / "run"
        answer = run(capsys, "train", "--quiet", str(folder / "config.yaml"))
        message = (
            f"training.output_dir: {folder} holds a run already: --resume goes on with it, --overwrite replaces it"
        )
        assert one_line(answer) == message

    @pytest.mark.parametrize("more", ["--optim lomo", "--target-modules [lm_head]"])
    def test_a_run_is_not_replaced_by_one_that_cannot_begin(
        self, more: str, begun: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = contents(begun)
        config = str(begun / "run" / "config.yaml")
        one_line(run(capsys, "train", "--quiet", config, "--overwrite", *more.split()))
        assert contents(begun) == before


def test_the_message_comes_last_after_what_was_done(good: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    good.remove("--quiet")
    answer = run(capsys, *good, "--target-modules", "[q_porj]")
    message = "fastpeft: lora.target_modules: no module has the name 'q_porj', did you mean 'q_proj'?"
    assert answer.err == f"reading the data\nloading the model\n{message}\n"
