"""Run the tests of another library over accelerated models; those that fail, again without fastpeft.

    python -m fastpeft.bench.suites /path/to/peft/tests/test_custom_models.py -k "lora and not conv"

All but --hub is handed on to pytest. Names on the hub mean tiny models with
random weights (`hub.py`); nothing is downloaded. The exit code is 1 where a test fails with fastpeft alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .hub import make_hub


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastpeft.bench.suites",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hub", type=Path, metavar="DIR", help="keep the tiny models there, for the next run")
    given, handed_on = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        hub = given.hub or Path(folder) / "hub"
        make_hub(hub, _sources(handed_on))
        ours = _run(handed_on, hub, Path(folder))
        failed = [test for test, outcome in ours["tests"].items() if outcome == "failed"]
        again = Path(folder) / "failed"
        again.write_text("\n".join(failed))
        plain = _run([f"@{again}", "--plain"], hub, Path(folder))["tests"] if failed else {}
    alone = [test for test in failed if plain.get(test) != "failed"]
    counts = Counter(ours["tests"].values())
    print(f"{len(ours['tests'])} run, {counts['passed']} passed, {counts['skipped']} skipped or expected to fail, "
          f"{len(failed) - len(alone)} failed without fastpeft too, {len(alone)} with fastpeft alone; "
          f"{ours['counts'].get('accelerated', 0)} times a model was accelerated, "
          f"with {ours['counts'].get('adapter layers', 0)} adapter layers")  # fmt: skip
    print(*alone, sep="\n")
    return 1 if alone else 0


def _sources(arguments: Sequence[str]) -> str:
    """Of all modules beside those that are named: tests share their models' names."""
    paths = [Path(word.partition("::")[0]) for word in arguments]
    folders = {path if path.is_dir() else path.parent for path in paths if path.exists()}
    if not folders:
        raise SystemExit(f"expected the path of a file or folder of tests, got {' '.join(arguments)!r}")
    return "\n".join(file.read_text() for folder in folders for file in sorted(folder.rglob("*.py")))


def _run(arguments: Sequence[str], hub: Path, folder: Path) -> dict[str, Any]:
    """What `accelerated` wrote of one run of pytest. The suite's own configuration adds no options and no errors."""
    outcomes = folder / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "fastpeft.bench.suites.accelerated",
        "-q",
        "--outcomes",
        str(outcomes),
    ]
    command += ["-o", "addopts=", "-o", "filterwarnings=", "-p", "no:cacheprovider", *arguments]
    ended = subprocess.run(command, env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"})
    if ended.returncode not in (0, 1) or not outcomes.exists():  # all passed, or some failed
        raise SystemExit(f"pytest could not run these tests: it ended with code {ended.returncode}")
    return json.loads(outcomes.read_text())  # type: ignore[no-any-return]


if __name__ == "__main__":
    raise SystemExit(main())
