"""What a part of a GPU run writes its measurements with."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from fastpeft.bench.records import Record, RecordFile

_UNITS = {  # the first ending that fits
    "_gb_s": "GB/s",
    "_gb_per_s": "GB/s",
    "_gbs": "GB/s",
    "_tflops": "TFLOP/s",
    "_ms": "ms",
    "_us": "us",
    "_s": "s",
    "_mib": "MiB",
    "_gib": "GiB",
    "_bytes": "B",
    "_percent": "%",
}
Check = tuple[str, Callable[[], Mapping[str, Any] | None]]
CheckName = tuple[str, str]
"""Op, and the name of a check among that op's."""


class Recorder:
    """Records of one part.

    Args:
        file: where they go.
        suite: name of the part.
        device: "cuda", or "cpu" in a dry run.
        depth: "quick", "default" or "full"; kept in every record's settings.
        share: (i, n): of the checks, run every n-th from the i-th on.
        match: run only checks in whose name this regular expression is found.
        proven: checks that come after all others, because they passed in an earlier run.
        done: checks that are left out, because they passed in this run before it was resumed.
    """

    def __init__(
        self,
        file: RecordFile,
        suite: str,
        device: str,
        depth: str,
        share: tuple[int, int] = (0, 1),
        match: str = "",
        proven: Collection[CheckName] = (),
        done: Collection[CheckName] = (),
    ) -> None:
        self.file = file
        self.suite = suite
        self.device = device
        self.depth = depth
        self.share = share
        self.match = match
        self.proven = frozenset(proven)
        self.done = frozenset(done)

    def add(
        self, *, samples: Sequence[float] | float, settings: Mapping[str, Any] | None = None, **fields: Any
    ) -> Record:
        """Append a record: case, op, peer, metric, unit and samples; settings, error and budget if there are any."""
        settings = {**(settings or {}), "depth": self.depth}
        return self.file.add(suite=self.suite, samples=samples, settings=settings, **fields)

    def run_checks(self, op: str, checks: Iterable[Check]) -> None:
        """`run_suites` of one op."""
        self.run_suites({op: checks})

    def run_suites(self, suites: Mapping[str, Iterable[Check]]) -> None:
        """Run each (name, callable) of every op in turn, whatever became of those before, and record what it returns.

        A callable returns figures by name, or None; numbers become records, whose unit is read from the name's ending
        ("decode_ms"); other values become settings. Each check leaves a record "passed" of 1 or 0.

        Raises:
            AssertionError: at the end, if some raised; names them.
        """
        everything = [
            (op, name, check)
            for op, checks in suites.items()
            for name, check in checks
            if re.search(self.match, name) and (op, name) not in self.done
        ]
        everything.sort(key=lambda each: each[:2] in self.proven)
        shared = everything[self.share[0] :: self.share[1]]
        failed = [name for op, name, check in shared if not self._run(op, name, check)]
        if failed:
            raise AssertionError(f"{len(failed)} failed: {', '.join(failed)}")

    def _run(self, op: str, name: str, check: Callable[[], Mapping[str, Any] | None]) -> bool:
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            figures = dict(check() or {})
        except Exception as error:
            print(f"{name}: {traceback.format_exc()}", flush=True)  # in one write: other processes may share the log
            self._passed(op, name, 0.0, {"failure": f"{type(error).__name__}: {error}"})
            return False
        finally:
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
            self._free_memory()
        numbers = {key: float(value) for key, value in figures.items() if isinstance(value, Real)}
        others = {key: str(value) for key, value in figures.items() if key not in numbers}
        for key, value in numbers.items():
            fields = {"case": name, "op": op, "peer": "fastpeft", "metric": key, "unit": unit_of(key)}
            self.add(**fields, samples=value, settings=others)
        self._passed(op, name, 1.0, others)
        return True

    def _free_memory(self) -> None:
        """Give back what torch holds on to: other processes may share the GPU."""
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _passed(self, op: str, case: str, value: float, settings: Mapping[str, Any]) -> None:
        self.add(case=case, op=op, peer="fastpeft", metric="passed", unit="1", samples=value, settings=settings)


def unit_of(metric: str) -> str:
    """Unit by the ending of a figure's name; "1" for plain numbers."""
    return next((unit for ending, unit in _UNITS.items() if metric.lower().endswith(ending)), "1")
