"""Questions to the system, each with a time limit; none of them loads torch."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .findings import in_short

Version = tuple[int, int]

NVIDIA_SMI_LIMIT_S = 20.0  # without persistence mode it wakes every GPU first, a second or so each
_FIELDS = (
    *("name", "uuid", "driver_version", "memory.total", "memory.free"),
    *("pcie.link.gen.max", "pcie.link.width.max", "pcie.link.width.current"),
    "compute_cap",
)
_WSL_FOLDER = "/usr/lib/wsl/lib"  # not on every shell's path
_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"


@dataclass(frozen=True)
class SmiGpu:
    """A GPU as nvidia-smi sees it. None: it does not say.

    Attributes:
        capability: 10 * major + minor.
        total_bytes, free_bytes: memory.
        generation, width: of PCI Express, the most that GPU and slot allow; `width_now`: lanes in use.
    """

    name: str
    uuid: str = ""
    capability: int | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    generation: int | None = None
    width: int | None = None
    width_now: int | None = None


@dataclass(frozen=True)
class Smi:
    """What nvidia-smi says.

    Attributes:
        driver: its version.
        error: why it says nothing; empty when it is not installed.
        hangs: it never answered.
    """

    gpus: tuple[SmiGpu, ...] = ()
    driver: str | None = None
    error: str = ""
    hangs: bool = False


def answer(*command: str, limit_s: float) -> str:
    """What a command prints.

    Raises:
        OSError: it cannot be started.
        TimeoutError: it took longer than `limit_s` seconds.
        RuntimeError: it failed; with the first line that it printed.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # no longer: a process that hangs inside a driver cannot even be killed
        if process.stdout is not None:
            process.stdout.close()
        raise TimeoutError(f"{Path(command[0]).name} did not answer in {limit_s:g} s") from None
    if process.returncode != 0:
        raise RuntimeError(in_short(said) or f"exit code {process.returncode}")
    return said


def nvidia_smi() -> Smi:
    """Ask nvidia-smi for GPUs and driver; never raises."""
    try:
        return Smi(*_smi_gpus())
    except FileNotFoundError:
        return Smi()
    except TimeoutError as error:
        return Smi(error=str(error), hangs=True)
    except (OSError, RuntimeError) as error:
        return Smi(error=in_short(str(error)))


def smi_cuda() -> Version | None:
    """The newest CUDA that the driver supports, from the head of nvidia-smi's table; None if it does not say."""
    try:
        return _version(r"CUDA (?:UMD )?Version\s*:\s*(\d+)\.(\d+)", _smi())
    except (OSError, RuntimeError):  # TimeoutError is an OSError
        return None


def _smi_gpus() -> tuple[tuple[SmiGpu, ...], str | None]:
    try:
        rows = _query(_FIELDS)
    except RuntimeError as error:
        if "not a valid field" not in str(error):
            raise
        rows = _query(_FIELDS[:-1])  # drivers before 510 do not know compute_cap
    gpus = tuple(_smi_gpu(row) for row in rows)
    return gpus, rows[0].get("driver_version") if rows else None


def _query(fields: tuple[str, ...]) -> list[dict[str, str]]:
    said = _smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]  # others are remarks


def _smi(*options: str) -> str:
    path = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL_FOLDER) or "nvidia-smi"
    return answer(path, *options, limit_s=NVIDIA_SMI_LIMIT_S)


def _smi_gpu(row: dict[str, str]) -> SmiGpu:
    def number(key: str) -> int | None:
        return int(row[key]) if row[key].isdecimal() else None  # "[N/A]" and the like

    total, free = number("memory.total"), number("memory.free")
    capability = re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
    return SmiGpu(
        name=row["name"],
        uuid=row["uuid"].removeprefix("GPU-"),
        capability=None if capability is None else 10 * int(capability[1]) + int(capability[2]),
        total_bytes=None if total is None else total * 2**20,
        free_bytes=None if free is None else free * 2**20,
        generation=number("pcie.link.gen.max"),
        width=number("pcie.link.width.max"),
        width_now=number("pcie.link.width.current"),
    )


def driver_cuda() -> Version | None:
    """The newest CUDA that the driver library supports which programs load here; None without one.

    Differs from nvidia-smi's answer where a compatibility package replaces the driver's own library.
    """
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number = ctypes.c_int()
        failed = library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed or not number.value else cuda_version(number.value)


def cuda_version(number: int) -> Version:
    """(12, 8) of 12080, as CUDA writes versions."""
    return number // 1000, number % 1000 // 10


def has_device_node() -> bool:
    """Whether the driver offers a GPU to this system or container."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def nvidia_on_bus(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether an NVIDIA GPU is plugged in, driver or not; False where the bus cannot be read. Containers see it too."""
    try:
        return any(
            (device / "vendor").read_text().strip() == _NVIDIA_VENDOR
            and (device / "class").read_text().startswith(_DISPLAY_CLASS)
            for device in devices.iterdir()
        )
    except OSError:
        return False


def dotted(version: Version | None) -> str | None:
    return None if version is None else f"{version[0]}.{version[1]}"


def parsed(text: str | None) -> Version | None:
    """(12, 8) of "12.8" or "12.8.1"."""
    return _version(r"(\d+)\.(\d+)", text or "")


def _version(pattern: str, text: str) -> Version | None:
    found = re.search(pattern, text)
    return None if found is None else (int(found[1]), int(found[2]))
