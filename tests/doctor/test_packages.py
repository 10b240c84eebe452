"""Versions against what is supported."""

from __future__ import annotations

from importlib import metadata

import pytest

from fastpeft.doctor import packages
from fastpeft.doctor.findings import Finding
from fastpeft.integrations.versions import MINIMUM, MINIMUM_OF_EXTRAS
from tests.fresh import ROOT

GOOD = {"transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", "trl": "1.16.0", "datasets": "5.2.0"} | {
    "matplotlib": "3.11.2",
    "tensorboard": "2.21.0",
    "sentencepiece": "0.2.3",
    "scikit-learn": "1.9.1",
    "datasketch": "2.0.0",
}


def check(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> dict[str, Finding]:
    have = GOOD | versions

    def version(name: str) -> str:
        if (known := have.get(name)) is None:
            raise metadata.PackageNotFoundError(name)
        return known

    monkeypatch.setattr(metadata, "version", version)
    return {finding.name: finding for finding in packages.packages()}


def test_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(monkeypatch)
    assert {name: finding.text for name, finding in found.items()} == GOOD
    assert {finding.status.value for finding in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("name", "version", "status", "said"),
    [
        ("transformers", "4.57.0", "problem", "fastpeft needs transformers>=5.17 (4.57.0 is installed)"),
        ("peft", None, "problem", "fastpeft needs peft>=0.19.1 (not installed)"),
        ("accelerate", "1.2.0", "warning", "fastpeft needs accelerate>=1.10 (1.2.0 is installed)"),
        ("trl", "0.9.0", "warning", "older than the 1.10 that is supported"),
        ("trl", None, "note", "not installed"),
        ("datasets", None, "note", "not installed"),
        ("matplotlib", None, "note", "not installed"),
        ("tensorboard", None, "note", "not installed"),
    ],
)
def test_missing_and_old(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, status: str, said: str
) -> None:
    found = check(monkeypatch, **{name: version})
    assert found[name].status.value == status and said in found[name].text
    assert found[name].values == {"version": version}
    assert {other.status.value for other in found.values() if other is not found[name]} == {"ok"}
    if name in packages.OPTIONAL:
        assert "pip install 'fastpeft[train]'" in found[name].advice


def test_what_is_supported_is_what_the_package_asks_for() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = MINIMUM_OF_EXTRAS
    optional = {f"{name}>={least[name]}" if name in least else name for name in packages.OPTIONAL}
    assert optional == set(project["optional-dependencies"]["train"])
    assert set(packages.NEEDED) == set(MINIMUM) - {"torch", "bitsandbytes"}
