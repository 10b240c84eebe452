"""Options of the project's own tests and benchmarks; pytest loads this file through `-p` in pyproject.toml.

It is here and not in `tests/conftest.py` because pytest reads options before it looks for tests: there,
`pytest --real-models DIR` would take DIR for a folder of tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fastpeft")
    help_real = "folder of real checkpoints, one sub-folder each; their tests are skipped without it"
    group.addoption("--real-models", type=Path, metavar="DIR", help=help_real)
    group.addoption("--seed", type=int, help="seed of every test's random inputs; by default its name's")
    depths = ("quick", "default", "full")
    group.addoption("--depth", choices=depths, default="quick", help="how many cases and rounds a benchmark has")
