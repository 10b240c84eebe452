"""Runs a notebook's code cells in order, as a kernel would, in this process.

    python -m tests.examples.notebooks NOTEBOOK '{"MODEL": ...}'

The names given replace the parameters in the cell tagged `parameters`; cells tagged `install` are not run. A line that
begins with `!fastpeft` runs the command in this process, which saves importing torch again.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PARAMETERS, INSTALL = "parameters", "install"


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def tags(cell: dict[str, Any]) -> list[str]:
    found: list[str] = cell["metadata"].get("tags", [])
    return found


def with_parameters(source: str, given: dict[str, Any]) -> str:
    """The parameters' cell with other values; raises KeyError for a name that it does not have."""
    for name, value in given.items():
        source, count = re.subn(
            rf"^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", source, flags=re.MULTILINE
        )
        if count != 1:
            raise KeyError(name)
    return source


def run(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells; returns what they defined."""
    namespace: dict[str, Any] = {"__name__": "__main__", "_command": _command}
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code" or INSTALL in tags(cell):
            continue
        source = "".join(cell["source"])
        if PARAMETERS in tags(cell):
            source = with_parameters(source, given)
        source = re.sub(r"^!(.*)$", lambda line: f"_command({line[1]!r})", source, flags=re.MULTILINE)
        exec(compile(source, f"{path.name}, cell {cell['id']}", "exec"), namespace)
    return namespace


def _command(line: str) -> None:
    from fastpeft.cli.app import run

    program, *arguments = line.split()
    assert program == "fastpeft", line
    code = run(arguments)
    assert code in (0, 1), f"exit code {code} of {line}"  # 1: the doctor found something, which stops no notebook


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
