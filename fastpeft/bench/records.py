"""One schema for everything that is measured: a record says what, against what, where, with which versions.

Records are kept as JSON Lines: one record a line, appended as soon as it is measured, so that a run that is killed
loses nothing. Nothing measured is imported here: versions come from the packages' metadata.

What benchmarks share, so that reports need to know no benchmark:

- peers: "fastpeft", "torch", "torch.compile", "peft", "peft + liger", "liger", "unsloth", "trl", "bitsandbytes",
  "flex", "sdpa flash", "sdpa efficient", "sdpa cudnn", "flash-attn", "cut cross-entropy"; in other ways "torch fused",
  "torch in chunks", "liger on copies" (of what it writes over); one that is measured twice, to show the noise,
  has " again" after its name the second time. "fastpeft layers": PEFT's layers, accelerated, where "fastpeft" is the op
  alone; "copy": of a result that is there.
- metrics: "time" in ms, "peak memory" in MiB beside what lay there before, "speed" in tokens/s; "left out" (one
  sample, 1) for a peer that has no figure, with settings["reason"].
- settings: "direction" ("forward", "backward", "both"), "dtype", "model", "tokens", "rank", "threads"; "flops" and
  "bytes" of the floor of a time; "beside" names a peer that had rounds of its own with another; "axis" in suite
  "scaling" names the setting that varies.
- ceilings of the machine, measured in the same run: op "ceiling", peer "torch", metric "rate"; case "copy" in GB/s,
  case "matrix float32", "matrix bfloat16", ... in TFLOP/s.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from fastpeft.structured import build
from fastpeft_kernels.common.host import cpu_name

SCHEMA = 1
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "safetensors"),
    *("liger-kernel", "unsloth", "flash-attn", "numpy", "torchao", "hqq"),
)
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """Where and with what something was measured. None: not there, or not to be found out.

    Attributes:
        device: name of the GPU or CPU that did the work.
        device_type: "cuda" or "cpu".
        commit, dirty: state of the source tree, results aside.
        date: UTC, ISO 8601, to the second.
        versions: installed packages; fastpeft's own among them.
        driver, cuda, ptxas: of the GPU; CUDA as torch was built with; the assembler that Triton uses for this GPU.
    """

    device: str
    device_type: str
    commit: str | None
    dirty: bool | None
    date: str
    python: str
    system: str
    versions: dict[str, str]
    driver: str | None = None
    cuda: str | None = None
    ptxas: str | None = None


@dataclass(frozen=True)
class Record:
    """One measured quantity.

    Attributes:
        suite: the part or benchmark that measured it; names the command to run it again.
        case: shape, dtype and direction, in words that are stable across runs.
        op: name of the op, as its folder has it.
        peer: who was measured: "fastpeft", "peft", "torch", "bitsandbytes", "liger", ...
        metric, unit: such as "time" in "ms", "peak_memory" in "MiB".
        samples: every value measured, in order; `median` is theirs.
        settings: whatever else defines the case: rank, tokens, configuration.
        error, budget: largest deviation from the fp64 oracle, and what was allowed; None where nothing was compared.
    """

    suite: str
    case: str
    op: str
    peer: str
    metric: str
    unit: str
    samples: list[float]
    median: float
    environment: Environment
    settings: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    budget: float | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema: expected {SCHEMA}, got {self.schema}")
        if not self.samples or not all(math.isfinite(value) for value in self.samples):
            raise ValueError(f"samples: expected one or more finite numbers, got {self.samples}")
        if not math.isclose(self.median, median(self.samples), rel_tol=1e-9, abs_tol=1e-300):
            raise ValueError(f"median: expected {median(self.samples)}, the median of samples, got {self.median}")
        for name in ("suite", "case", "op", "peer", "metric"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a name, got ''")

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """A record from plain data. Raises ValueError or TypeError that names the key, expected and got."""
        return build(cls, data)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def over_budget(self) -> str:
        """Words to put behind who erred by more than was allowed, with how many times as much; empty for all others."""
        if self.error is None or self.budget is None or self.error <= self.budget:
            return ""
        return f"over budget: {self.error / self.budget:.2f}" if self.budget else "over budget"


class RecordFile:
    """A JSON Lines file of records.

    Args:
        path: the file; it and its folder are made at the first record.
        environment: goes into every record added.
    """

    def __init__(self, path: str | os.PathLike[str], environment: Environment) -> None:
        self.path = Path(path)
        self.environment = environment

    def add(self, *, samples: Sequence[float] | float, **fields: Any) -> Record:
        """Append a Record of the given fields (all but median and environment); a single number is one sample."""
        values = [float(samples)] if isinstance(samples, (int, float)) else [float(value) for value in samples]
        if not values:
            raise ValueError("samples: expected one or more finite numbers, got none")
        data = {**fields, "samples": values, "median": median(values), "environment": asdict(self.environment)}
        record = Record.from_dict(data)
        append(self.path, record)
        return record


def append(path: str | os.PathLike[str], record: Record) -> None:
    """Add one line to a file of records, which need not exist yet; in one write, so that lines never mix."""
    line = json.dumps(record.to_dict(), allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(line.encode())


def load(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file.

    Raises:
        ValueError: a line is not a valid record; the message names file, line, key.
    """
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield number, Record.from_dict(json.loads(line))
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error


def environment(device_type: str = "cpu", commit: str | None = None) -> Environment:
    """What this process measures with, as of now.

    Args:
        device_type: "cuda" for torch's current GPU, or "cpu".
        commit: of a source tree that is no git checkout, or not the one of its own git folder.

    Raises:
        ValueError: another device type.
        RuntimeError: "cuda", and torch sees no GPU.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type: expected 'cpu' or 'cuda', got {device_type!r}")
    found, dirty = (commit, None) if commit else source_state()
    return Environment(
        device_type=device_type,
        commit=found,
        dirty=dirty,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions=installed_versions(),
        **(_gpu() if device_type == "cuda" else {"device": f"{cpu_name()}, {os.cpu_count()} threads"}),
    )


def installed_versions() -> dict[str, str]:
    """Version of each of PACKAGES that is installed, and fastpeft's own."""
    from fastpeft_kernels import __version__

    found = {"fastpeft": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_state() -> tuple[str | None, bool | None]:
    if not (_ROOT / ".git").exists():  # an installed package may lie inside somebody else's checkout
        return None, None
    commit = _answer("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    status = _answer("git", "-C", str(_ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return commit or None, None if status is None else bool(status)


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("device_type: expected a GPU for 'cuda', but torch sees none")
    from fastpeft_kernels.common.device import device_capability, ptxas_version

    version = ptxas_version(device_capability("cuda") or 0)
    driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "ptxas": ".".join(map(str, version)) if version else None,
    }


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
