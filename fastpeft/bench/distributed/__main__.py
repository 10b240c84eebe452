"""The same training in one process and in several, by gloo on this CPU; its losses side by side.

python -m fastpeft.bench.distributed

Runs every leg, keeps the losses in --record, and makes the table and the picture of --page anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..records import environment
from ..tables import insert
from .legs import LEGS
from .page import figure, table

NAME = "distributed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            found = {"environment": asdict(environment("cpu")), "legs": _run(Path(folder))}
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(options.record.read_text())
    options.page.write_text(insert(options.page.read_text(), table(found), NAME))
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure(found, options.figure)
    return 0


def _run(folder: Path) -> list[object]:
    """What each leg gave, in their order. Two processes come first: others go on from their checkpoints."""
    legs = []
    for processes in (2, 1, 4):
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        starts = several if processes > 1 else []
        subprocess.run([sys.executable, *starts, "-m", "fastpeft.bench.distributed.worker", str(folder)], check=True)
        legs += json.loads((folder / f"{processes}.json").read_text())
    order = [(leg.base, leg.name) for leg in LEGS]
    return sorted(legs, key=lambda leg: order.index((leg["base"], leg["name"])))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.distributed", description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/distributed/cpu.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/how-to/several-gpus.md"), help="document of the table")
    parser.add_argument("--figure", type=Path, default=Path("docs/assets/distributed/losses.svg"))
    parser.add_argument("--table", action="store_true", help="run nothing; make table and picture from the record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
