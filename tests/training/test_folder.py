"""A run's folder: what is replaced, what is left alone, what goes to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastpeft.config import FastpeftConfig, StrategySection
from fastpeft.errors import UserError
from fastpeft.training import folder as run_folder
from tests.checkpoints import Checkpoints, write_rows
from tests.cli.wrong import contents
from tests.commands import run as command

from .runs import Run, adapter, chats, interrupted, train


@pytest.fixture(scope="module")
def settings(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", *chats())
    return ["--model", checkpoints["llama"], "--data", rows, "--batch-size", "4", "--report-to", "none"]


def test_a_replaced_run_leaves_nothing_and_takes_nothing_else_along(settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, *settings, "--max-steps", "3")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-mine").mkdir()
    before = adapter(folder)
    train(folder, *settings, "--max-steps", "2", "--overwrite", "--lora.r", "3")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-mine"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert {tuple(value.shape) for value in adapter(folder).values()} != {
        tuple(value.shape) for value in before.values()
    }


def test_overwriting_a_new_folder_is_no_mistake(settings: list[str], tmp_path: Path) -> None:
    assert train(tmp_path / "new", *settings, "--max-steps", "1", "--overwrite").record["steps"] == 1


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "checkpoint-5"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_something_else_is_left_alone(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if name.startswith("checkpoint") else (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"^training\.output_dir: expected a folder of a run or a new one, .*{name}$"):
        run_folder.prepare(tmp_path, resume=False, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_first_checkpoint_that_was_never_finished_is_nothing_to_lose(tmp_path: Path) -> None:
    half = tmp_path / "checkpoint-5"
    half.mkdir()
    (half / "adapter_model.safetensors").write_text("half")
    (tmp_path / run_folder.FINGERPRINT).write_text("of its rows")
    assert run_folder.prepare(tmp_path, resume=False, overwrite=False) is None
    with pytest.raises(
        UserError, match=r"--resume: expected a checkpoint in training.output_dir, got none that is whole"
    ):
        run_folder.prepare(tmp_path, resume=True, overwrite=False)
    (half / "sealed.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run already"):
        run_folder.prepare(tmp_path, resume=False, overwrite=False)


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^training\.output_dir: expected a folder that can be written, got .*/file/run$"
    ):
        run_folder.prepare(tmp_path / "file" / "run", resume=False, overwrite=False)


def test_one_run_at_a_time(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_folder.held(tmp_path):
        answer = command(capsys, "train", "--quiet", "--output-dir", str(tmp_path), *settings, "--max-steps", "1")
        assert (answer.code, answer.err) == (
            2,
            f"fastpeft: training.output_dir: expected a folder that no other run writes, got {tmp_path}\n",
        )
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert train(tmp_path, *settings, "--max-steps", "1").record["steps"] == 1


def test_a_run_that_another_has_written_meanwhile_is_not_replaced(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was there neither when this one looked first nor held then."""
    prepare = run_folder.prepare

    def then_another(folder: Path, **how: bool) -> Path | None:
        found = prepare(folder, **how)
        (folder / "run.json").write_text("{}")
        (folder / "data.sha256").write_text("0")
        return found

    monkeypatch.setattr(run_folder, "prepare", then_another)
    answer = command(capsys, "train", "--quiet", "--output-dir", str(tmp_path), *settings, "--max-steps", "1")
    assert answer.code == 2 and "holds a run already" in answer.err
    assert (tmp_path / "run.json").read_text() == "{}"


def test_a_home_folder_holds_all_of_a_run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    train(Path("~/run"), *settings, "--max-steps", "1")
    assert {"checkpoint-1", "run.json", "adapter_config.json"} <= {
        path.name for path in (tmp_path / "home/run").iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_checkpoints_without_the_optimizers_state_are_not_resumed(settings: list[str], tmp_path: Path) -> None:
    arguments = [*settings, "--max-steps", "2", "--training.extra.save_only_model", "true"]
    train(tmp_path / "run", *arguments)
    train(tmp_path / "run", "--resume", code=2)


def test_a_signal_does_not_promise_to_go_on_from_them(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "run", *settings, "--training.extra.save_only_model", "true", "--max-steps", "2", at=1)
    further = "--resume cannot go on from it, because save_only_model left the optimizer's state out"
    assert capsys.readouterr().err == f"fastpeft: SIGTERM: {tmp_path}/run/checkpoint-1 was saved; {further}\n"


class TestUpload:
    """With the hub answering in its place."""

    @pytest.fixture
    def uploaded(
        self, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> tuple[Run, list[tuple[str, dict[str, Any]]]]:
        calls: list[tuple[str, dict[str, Any]]] = []

        class Hub:
            def __init__(self, token: str | None = None) -> None: ...

            def create_repo(self, name: str, **options: Any) -> Any:
                calls.append((name, options))
                return type("Created", (), {"repo_id": f"me/{name}"})

            def upload_folder(self, **options: Any) -> None:
                files = {path.name: path.read_bytes() for path in options["folder_path"].iterdir()}
                calls.append((options["repo_id"], files))

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_some")
        monkeypatch.setattr("fastpeft.training.arguments.unreachable", lambda: None)
        more = ["--push-to-hub", "--max-steps", "2", "--training.extra.hub_private_repo", "true"]
        return train(tmp_path / "tuned", *settings, *more), calls

    def test_the_adapter_goes_there_once_at_the_end(
        self, uploaded: tuple[Run, list[tuple[str, dict[str, Any]]]]
    ) -> None:
        run, [created, sent] = uploaded
        assert created == ("tuned", {"private": True, "exist_ok": True})
        assert sent[0] == "me/tuned" and not [name for name in sent[1] if "checkpoint" in name]
        assert b"trained with fastpeft and PEFT: 2 steps" in sent[1]["README.md"]
        assert sent[1]["adapter_model.safetensors"] == (run.folder / "adapter_model.safetensors").read_bytes()

    def test_no_path_of_this_machine_goes_along(self, uploaded: tuple[Run, list[tuple[str, dict[str, Any]]]]) -> None:
        run, [_, (_, files)] = uploaded
        local = FastpeftConfig.from_yaml(run.folder / "config.yaml")
        assert Path(local.model.name).is_absolute()
        for name, content in files.items():
            if not name.startswith("tokenizer") and not name.endswith((".png", ".safetensors")):
                for path in (local.model.name, local.data.path, str(run.folder)):
                    assert path.encode() not in content, name
        assert b"base_model" not in files["README.md"]


def test_adapters_of_tasks_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    tasks = {name: {} for name in ("news", "notes", "link", "near", "../other", ".")}
    config = FastpeftConfig(strategy=StrategySection(name="multi-task", options={"tasks": tasks}))
    run_folder.begin(run, config, "0", 1)
    adapters = [run / "news", run / "merged" / "ties", run / "apart", other]
    for folder in adapters:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").touch()
    (run / "notes").mkdir()
    (run / "link").symlink_to(other)
    (run / "near").symlink_to(run / "apart")
    run_folder.clear(run)
    assert sorted(path.name for path in run.iterdir()) == ["apart", "link", "near", "notes"]
    assert (other / "adapter_config.json").is_file()
