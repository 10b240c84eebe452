from importlib import metadata
from pathlib import Path

import pytest
from torch import nn

import fastpeft
from fastpeft import requirements
from fastpeft.requirements import EXTRAS, MINIMUM, check_versions, require
from tests.fresh import ROOT


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(requirements.metadata, "version", version)


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


def test_the_tested_versions_are_supported() -> None:
    assert check_versions() is None


@pytest.mark.parametrize("torch", ["2.11", "2.11.0+cpu", "2.13.0rc1", "3.0.dev0"])
def test_new_enough(monkeypatch: pytest.MonkeyPatch, torch: str) -> None:
    pretend(monkeypatch, torch=torch, transformers="5.100", peft="0.18.0", accelerate="1.10.0", bitsandbytes="1.0")
    assert check_versions() is None


def test_old_and_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.9.1+cu128", transformers="5.17.0", peft="0.18.0", accelerate="1.12")
    assert check_versions() == (
        "fastpeft needs torch>=2.11 (2.9.1+cu128 is installed), bitsandbytes>=0.48 (not installed): "
        "pip install --upgrade fastpeft"
    )


def test_accelerating_with_an_old_peft_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.13.0", transformers="5.23.0", peft="0.17.1")
    requirements.require_core.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"fastpeft needs peft>=0.18 \(0.17.1 is installed\)"):
            fastpeft.accelerate(nn.Linear(2, 2))
    finally:
        requirements.require_core.cache_clear()


def test_minimums_and_extras_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={least}" for name, least in MINIMUM.items()} <= set(project["dependencies"])
    assert set(EXTRAS) == set(project["optional-dependencies"])
