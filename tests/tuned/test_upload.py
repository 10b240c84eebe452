"""What a run puts on the hub: enough to use it, and no word of this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpeft.config import FastpeftConfig
from fastpeft.config_keys import keys
from fastpeft.models import bases
from fastpeft.training.uploading import published, upload

from .conftest import SHIPPED, train, write_rows

SECRET = "the-secret-folder"


@pytest.fixture(scope="module")
def secret_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data, template and output lie in a folder whose name nobody should see."""
    folder = tmp_path_factory.mktemp("upload") / SECRET
    folder.mkdir()
    shutil.copytree(SHIPPED, folder / "model")
    turns = [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "yes yes yes"}]
    data = write_rows(folder / "chats.jsonl", [{"messages": turns}] * 4)
    other = write_rows(folder / "others.jsonl", [{"messages": [{"role": "user", "content": "Again."}, turns[1]]}])
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    (folder / "template.jinja").write_text(template)
    words = ("--model", folder / "model", "--data", data, "--eval-path", other, "--max-steps", 1, "--max-length", 32)
    more = ("--chat-template", folder / "template.jinja", "--training.extra.run_name", folder / "name")
    return train(folder / "run", *words, *more, "--data.assistant_only", "false")


def settings_with_paths(folder: Path) -> FastpeftConfig:
    """The run's own, and a path in every other text that a configuration can hold."""
    config = FastpeftConfig.from_yaml(folder / "config.yaml")
    values = config.to_dict()
    for key in [key for key, found in keys().items() if found.kind in (str, str | None)]:
        section, _, name = key.rpartition(".")
        if SECRET not in str(values[section][name]):
            values[section][name] = f"/{SECRET}/spaces, at which YAML divides what is long {'x' * 80}/{name}"
    values["strategy"]["options"] = {"teacher": f"/{SECRET}/teacher"}
    values["lora"]["extra"] = {"some": [f"/{SECRET}/some"], f"/{SECRET}/key": 1}
    values["training"]["hub_model_id"] = "me/mine"
    return FastpeftConfig.from_dict(values)


@pytest.mark.parametrize("everywhere", [False, True])
def test_no_local_path_is_published(everywhere: bool, secret_run: Path, tmp_path: Path) -> None:
    config = settings_with_paths(secret_run) if everywhere else FastpeftConfig.from_yaml(secret_run / "config.yaml")
    assert str(config.to_dict()).count(SECRET) >= (8 if everywhere else 4)
    published(secret_run, config, AutoTokenizer.from_pretrained(secret_run), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "report.md", "README.md", "adapter_config.json", "loss.png"} <= {path.name for path in files}
    assert [path.name for path in files if SECRET.encode() in path.read_bytes()] == []
    assert "template.jinja" in (tmp_path / "report.md").read_text()
    again = FastpeftConfig.from_yaml(tmp_path / "config.yaml")
    assert (again.model.name, again.data.chat_template) == ("model", "template.jinja")


def test_tokens_that_look_like_paths_stay(secret_run: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.add_tokens(["/data", "/data/more"])
    config = FastpeftConfig.from_yaml(secret_run / "config.yaml").override(["data.path=/data"])
    published(secret_run, config, tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert FastpeftConfig.from_yaml(tmp_path / "config.yaml").data.path == "data"


def test_what_is_uploaded_can_be_used(chat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    class Hub:
        def create_repo(self, name: str, **options: object) -> object:
            return type("Made", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    config = FastpeftConfig.from_yaml(chat_run / "config.yaml")
    assert upload(chat_run, config, AutoTokenizer.from_pretrained(chat_run)) == "me/chat"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SHIPPED), str(tmp_path / "uploaded"))
    tokenizer = bases.load_tokenizer(config.model.__class__(name=str(tmp_path / "uploaded")))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(chat_run).chat_template
