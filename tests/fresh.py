"""Code in a process of its own: for what an import does, and for modules that are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_fresh(code: str, blocked: Iterable[str] = ()) -> str:
    """Run `code` in a fresh interpreter where the modules `blocked` cannot be imported; returns what it printed."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{block}{code}"], capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode} of:\n{code}\n{done.stdout}{done.stderr}")
    return done.stdout
