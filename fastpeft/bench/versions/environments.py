"""A leg's environment: a virtual one that borrows all that the leg does not vary from the one that runs this.

One of another torch borrows nothing: pip makes it as a user would, with the Triton and the CUDA libraries that this
torch asks for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from ..records import _ROOT as ROOT
from .legs import Leg

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
LAID_DOWN = ("torch", "triton", "numpy")
"""What pip must not bring anew: compiled for one another, and large."""
WHOLE_GIB = 16
"""Room for an environment that borrows nothing, and for what pip unpacks meanwhile; with torch 2.15 it takes 7."""


def releases(name: str) -> list[str]:
    """All that pip finds of a package for this Python.

    Raises:
        RuntimeError: pip finds none; with its words.
    """
    said = _run([*PIP, "index", "versions", name])
    found = [line.partition(":")[2] for line in said.splitlines() if line.startswith("Available versions:")]
    return found[0].replace(" ", "").split(",") if found else []


def python_of(leg: Leg, folder: Path) -> Path:
    """The Python of a leg's environment, which is made where it is not there, or of other versions.

    Raises:
        RuntimeError: pip cannot install the versions together, with its words; or there is no room for them.
    """
    home = folder / leg.folder
    python, stamp = home / "bin" / "python", home / "versions.json"
    wanted = json.dumps(leg.versions if leg.whole else leg.versions | _laid_down())
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if leg.whole:
        _check_room(folder)
    _run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(home)])
    pins = [f"{name}=={version}" for name, version in leg.versions.items()]
    if leg.whole:
        pins += ["--no-cache-dir", "-e", f"{ROOT}[train,bench,dev]"]
    else:
        pins += ["-c", str(_borrow(home, python))]
    _run([*PIP, "--python", str(python), "install", "-q", *pins])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _check_room(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 2**30
    if free < WHOLE_GIB:
        raise RuntimeError(f"{folder}: an environment of another torch needs {WHOLE_GIB} GiB of room, got {free:.1f}")


def _borrow(home: Path, python: Path) -> Path:
    """Lets an environment import what is installed here; gives pip's file of what must stay as it is."""
    site = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    constraints = home / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in _laid_down().items()), encoding="utf-8")
    return constraints


def surroundings() -> dict[str, str]:
    """Environment variables under which a leg's Python imports this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def _laid_down() -> dict[str, str]:
    found = {}
    for name in LAID_DOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(" ".join(errors) or done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
    return done.stdout
