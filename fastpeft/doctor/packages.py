"""Versions of what fastpeft works with, against what it supports. Imports none of it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from fastpeft.integrations.versions import CORE, MINIMUM_OF_EXTRAS, check_versions, too_old

from .findings import Finding, note, ok, problem, warning

NEEDED = ("transformers", "peft", "accelerate")  # torch and bitsandbytes have checks of their own
OPTIONAL = ("trl", "datasets", "matplotlib", "tensorboard", "sentencepiece", "scikit-learn", "datasketch")
"""The extra `train`."""
INSTALL_OPTIONAL = "pip install 'fastpeft[train]'"


def packages() -> Iterator[Finding]:
    for name in NEEDED:
        yield _needed(name)
    for name in OPTIONAL:
        yield _optional(name)


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _needed(name: str) -> Finding:
    version = installed(name)
    wrong = check_versions([name])
    if wrong is None:
        return ok(name, str(version), version=version)
    needs, _, command = wrong.partition(": ")
    kind = problem if name in CORE else warning
    return kind(name, f"{version or 'not installed'}; {needs}", f"Run {command}.", version=version)


def _optional(name: str) -> Finding:
    version = installed(name)
    if version is None:
        return note(name, "not installed", f"Run {INSTALL_OPTIONAL} if you want it.", version=None)
    if too_old(name):
        least = MINIMUM_OF_EXTRAS[name]
        advice = f"Run {INSTALL_OPTIONAL} --upgrade for {name} {least} or newer."
        return warning(name, f"{version}, older than the {least} that is supported", advice, version=version)
    return ok(name, version, version=version)
