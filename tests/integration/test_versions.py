"""What is said of versions that are too old, and where the project knows of versions at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from torch import nn

import fastpeft
from fastpeft.integrations import versions
from fastpeft.integrations.versions import MINIMUM, MINIMUM_OF_EXTRAS, check_versions, require_core, told_by, too_old
from tests.fresh import ROOT

HOME = ROOT / "fastpeft" / "integrations"
WORDS = ("packaging", "__version__", "metadata.version")
"""One of which a file must have to compare versions."""


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(versions.metadata, "version", version)


def test_the_tested_versions_are_supported() -> None:
    assert check_versions() is None and not any(map(too_old, MINIMUM_OF_EXTRAS))


@pytest.mark.parametrize("torch", ["2.11", "2.11.0+cpu", "2.13.0rc1", "3.0.dev0"])
def test_new_enough(monkeypatch: pytest.MonkeyPatch, torch: str) -> None:
    pretend(monkeypatch, torch=torch, transformers="5.100", peft="0.19.1", accelerate="1.10.0", bitsandbytes="1.0")
    assert check_versions() is None


@pytest.mark.parametrize(("installed", "old"), [("0.19.0", True), ("0.19.1", False), ("0.19.1.dev0", False)])
def test_a_floor_within_a_minor_version(monkeypatch: pytest.MonkeyPatch, installed: str, old: bool) -> None:
    pretend(monkeypatch, peft=installed)
    assert (too_old("peft") is not None) is old


def test_a_shorter_number_is_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "MINIMUM", {"peft": "0.20.0"})
    pretend(monkeypatch, peft="0.20")
    assert too_old("peft") is None


def test_old_and_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.9.1+cu128", transformers="5.17.0", peft="0.19.1", accelerate="1.12")
    assert check_versions() == (
        "fastpeft needs torch>=2.11 (2.9.1+cu128 is installed), bitsandbytes>=0.49 (not installed): "
        'pip install --upgrade "torch>=2.11" "bitsandbytes>=0.49"'
    )


def test_an_encoder_decoder_too_new_for_peft_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, peft="0.20.0", transformers="5.24.0")
    error = AttributeError("'T5' object has no attribute '_prepare_encoder_decoder_kwargs_for_generation'")
    assert told_by(error) == (
        "encoder-decoders of transformers above 5.17 need peft>=0.21, got peft 0.20.0 and transformers 5.24.0: "
        'pip install --upgrade "peft>=0.21"'
    )
    assert told_by(AttributeError("'T5' object has no attribute 'name'")) is None


def test_accelerating_with_an_old_peft_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.13.0", transformers="5.23.0", peft="0.17.1")
    require_core.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"^fastpeft needs peft>=0.19.1 \(0.17.1 is installed\): pip install"):
            fastpeft.accelerate(nn.Linear(2, 2))
    finally:
        require_core.cache_clear()


def test_minimums_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {f"{name}>={least}" for name, least in MINIMUM.items()} <= set(project["dependencies"])
    extras = {each for extra in project["optional-dependencies"].values() for each in extra}
    assert {f"{name}>={least}" for name, least in MINIMUM_OF_EXTRAS.items()} <= extras


def comparing(tree: ast.AST) -> Iterator[int]:
    """Lines that compare or parse a package's version."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if any(name.split(".")[0] == "packaging" for name in names):
                yield node.lineno
        elif isinstance(node, ast.Compare):
            parts = [part for side in (node.left, *node.comparators) for part in ast.walk(side)]
            if any(isinstance(part, ast.Attribute) and part.attr == "__version__" for part in parts):
                yield node.lineno
            if any(isinstance(part, ast.Call) and ast.unparse(part.func) == "metadata.version" for part in parts):
                yield node.lineno


def test_versions_are_compared_in_the_integrations_alone() -> None:
    files = [path for folder in ("fastpeft", "kernels") for path in (ROOT / folder).rglob("*.py")]
    elsewhere = {path: path.read_text(encoding="utf-8") for path in files if HOME not in path.parents}
    assert len(elsewhere) > 100
    spoken = {path: text for path, text in elsewhere.items() if any(word in text for word in WORDS)}
    found = {path: list(comparing(ast.parse(text))) for path, text in spoken.items()}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        "from packaging import version",
        "import packaging.version as v",
        "if torch.__version__ >= '2': pass",
        "x = _numbers(torch.__version__) < (2, 11)",
        "x = (2,) <= parts(metadata.version('peft'))",
    ],
)
def test_a_comparison_is_seen(code: str) -> None:
    assert list(comparing(ast.parse(code)))


def test_where_the_integrations_are() -> None:
    assert Path(versions.__file__).parent == HOME
