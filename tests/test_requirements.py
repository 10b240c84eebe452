from pathlib import Path

import pytest

from fastpeft.integrations import versions
from fastpeft.requirements import EXTRAS, MissingExtraError, require
from tests.fresh import ROOT


def test_require_gives_the_module() -> None:
    assert require("train", "json.decoder").JSONDecoder


def test_a_missing_module_is_one_sentence() -> None:
    sentence = r'^the loss curve needs no_such_plotter, which is not installed: pip install "fastpeft\[train\]"$'
    with pytest.raises(ImportError, match=sentence):
        require("train", "no_such_plotter.pyplot", "the loss curve")


def test_a_broken_module_says_itself_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_module.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_thing'"):
        require("train", "broken_module")


def test_an_unknown_extra() -> None:
    with pytest.raises(ValueError, match="extra: expected one of train, multi, bench, bases, dev, docs, got 'all'"):
        require("all", "json")


@pytest.mark.parametrize("old", ["1.9.2", "0.29.1"])
def test_a_module_that_is_too_old_is_one_sentence(monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda package: old)
    sentence = rf'^training decoders needs trl>=1.10, but {old} is installed: pip install "fastpeft\[train\]"$'
    with pytest.raises(MissingExtraError, match=sentence):
        require("train", "trl", "training decoders")


def test_extras_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])
