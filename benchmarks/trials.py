"""What scripts of trials share: runs of the command, kept one by one in a JSON file, and the cells of their tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastpeft.bench.records import environment
from fastpeft.metrics.intervals import over_seeds

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "strategies"
FIGURES = ROOT / "docs" / "assets" / "strategies"

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """Empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def write(path: Path, records: Iterable[Record]) -> None:
    """One record a line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n", encoding="utf-8")


def fill(path: Path, cases: Iterable[Record], measure: Callable[[Record], Record]) -> list[Record]:
    """Measure the cases that a file lacks; it is written after each, so that what was broken off goes on.

    Args:
        path: of the records.
        cases: what tells a record from others; each becomes a part of its record.
        measure: gives the rest of a record.
    """
    records = read(path)
    for case in cases:
        if not any(case.items() <= record.items() for record in records):
            records.append(case | measure(case) | {"where": where()})
            write(path, records)
    return records


def where() -> Record:
    """Machine, date and versions, for a record."""
    found = environment()
    names = ("torch", "transformers", "peft")
    versions = {name: found.versions[name] for name in names}
    return {"device": found.device, "date": found.date, "commit": found.commit, "versions": versions}


def train(folder: Path, arguments: Sequence[str]) -> Record:
    """`fastpeft train --output-dir FOLDER ARGUMENTS`; gives its run.json.

    Raises:
        RuntimeError: it did not end well.
    """
    from fastpeft.cli import app

    if code := app.run(["train", "--quiet", "--overwrite", "--output-dir", str(folder), *arguments]):
        raise RuntimeError(f"fastpeft train: expected exit code 0, got {code}")
    found: Record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def options_of(settings: Record) -> list[str]:
    """{"lora.r": 8} as ["--lora.r", "8"]."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def row(name: str, cells: Iterable[str]) -> str:
    """Of a table in Markdown."""
    return f"| {name} | {' | '.join(cells)} |"


def said(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean and Student's interval over runs of other seeds; "-" for none."""
    if not values:
        return "-"
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in over_seeds(values))
    return f"{mean} ({low} to {high})"
