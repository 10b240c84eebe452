"""The process that fuzzes one target, with the memory that it may take limited."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from .targets import target_of
from .watching import LONGEST_S, Examiner, Finding, Target

MEMORY = 2 << 30
"""Bytes that inputs may take, beyond what the process has after its imports."""
LONGEST_INPUT = 4096
"""Bytes of what atheris makes."""
CHUNK = 200


class Log:
    """Findings as they come, each kind once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._seen: set[tuple[str, str]] = set()

    def add(self, finding: Finding, data: bytes) -> None:
        kind = (finding.what.partition(":")[0], finding.where)
        if kind not in self._seen:
            self._seen.add(kind)
            line = {**finding._asdict(), "input": b64encode(data[:LONGEST_INPUT]).decode()}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def with_hypothesis(target: Target, folder: Path, log: Log, seconds: float) -> tuple[int, int]:
    """Inputs of `target.texts`, drawn at random; returns how many, and how many of them were read."""
    examine, done = Examiner(target, folder), 0
    limit_memory()

    def one(data: bytes) -> None:
        nonlocal done
        if time.monotonic() < end:
            done += 1
            if (finding := examine(data)) is not None:
                log.add(finding, data)

    end, chunk = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        _drawn(target, one, CHUNK, chunk)()
        chunk += 1
    return done, examine.accepted


def with_atheris(target: Target, folder: Path, log: Log, seconds: float, corpus: Path) -> None:
    """Inputs that reach new code, grown from a few valid ones: half of them bytes, half drawn from `target.texts`.

    Does not come back: libFuzzer ends the process, and prints how many there were and how much code was reached.
    """
    import atheris  # type: ignore[import-not-found]

    examine = Examiner(target, folder, 2 * LONGEST_S)  # what it counts with costs as much again

    def one(data: bytes) -> None:
        if (finding := examine(data)) is not None:
            log.add(finding, data)

    drawn = _drawn(target, one, 1, 0).hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def either(data: bytes) -> None:
        drawn(data[1:]) if data[:1] < b"\x80" else one(data[1:])

    _drawn(target, lambda data: _keep(corpus, b"\xff" + data), 40, 0)()
    limit_memory()
    options = [f"-max_total_time={seconds:.0f}", f"-max_len={LONGEST_INPUT}", "-rss_limit_mb=0", "-timeout=120"]
    atheris.Setup([target.name, *options, "-print_final_stats=1", str(corpus)], either)
    atheris.Fuzz()


def _drawn(target: Target, one: Callable[[bytes], object], count: int, number: int) -> Callable[[], None]:
    checks = list(HealthCheck)
    how: Any = settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=checks
    )

    @seed(number)
    @how
    @given(target.texts)
    def draw(data: bytes) -> None:
        one(data)

    return draw


def _keep(corpus: Path, data: bytes) -> None:
    (corpus / f"{len(list(corpus.iterdir()))}").write_bytes(data)


def limit_memory() -> None:
    """From here on; what asks for more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(name: str, engine: str, seconds: str, place: str) -> None:
    """`python -m benchmarks.fuzz.worker TARGET ENGINE SECONDS FOLDER`."""
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    folder, corpus = Path(place) / "input", Path(place) / f"corpus-{engine}"
    folder.mkdir(exist_ok=True)
    corpus.mkdir(exist_ok=True)
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["fastpeft", "fastpeft_kernels", "yaml"]):
            target = target_of(name)
    target, log = target_of(name), Log(Path(place) / "findings.jsonl")
    os.chdir(folder)
    logging.disable()
    _drawn(target, Examiner(target, folder, 60), 3, 0)()  # a valid one is the first, and imports what will be needed
    if engine == "atheris":
        with_atheris(target, folder, log, float(seconds), corpus)
    done, accepted = with_hypothesis(target, folder, log, float(seconds))
    print(f"stat::number_of_executed_units: {done}\nstat::read: {accepted}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)  # threads of libraries may not end well with the memory limited


if __name__ == "__main__":
    main(*sys.argv[1:])
