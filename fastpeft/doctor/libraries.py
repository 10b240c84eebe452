"""The CUDA libraries that torch has loaded, asked for their versions themselves."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

from .findings import Finding, note, ok, warning
from .machine import Machine
from .system import cuda_version, dotted

_MAPS = Path("/proc/self/maps")


def cuda_libraries(machine: Machine) -> Iterator[Finding]:
    """Versions, and whether they are the ones that came with torch; nothing for other builds."""
    if not machine.torch.cuda:
        return
    import torch

    loaded = loaded_libraries(_MAPS.read_text()) if _MAPS.exists() else {}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    versions = {
        "cudart": _runtime_version(loaded.get("cudart")),
        "cublas": _cublas_version(loaded.get("cublas")),
        "cudnn": None if cudnn is None else f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}",
    }
    text = ", ".join(f"{name} {version or 'unknown'}" for name, version in versions.items())
    foreign = foreign_libraries(loaded, Path(torch.__file__).parents[1])
    values = {**versions, "foreign": foreign}
    if foreign:
        advice = (
            "Unset LD_LIBRARY_PATH: torch brings copies of its own, and other versions can fail or give wrong results."
        )
        yield warning("cuda libraries", f"{text}; not torch's own: {', '.join(foreign)}", advice, **values)
    elif cudnn is None:
        yield note("cuda libraries", text, "Reinstall torch if you train models with convolutions.", **values)
    else:
        yield ok("cuda libraries", text, **values)


def loaded_libraries(maps: str) -> dict[str, Path]:
    """ "cudart" and "cublas" to the files that this process has mapped; `maps` as /proc/self/maps has it."""
    found = re.findall(r"\s(/\S*/lib(cudart|cublas)[.-][^\s/]*)$", maps, re.MULTILINE)
    return {name: Path(path) for path, name in found}


def foreign_libraries(loaded: dict[str, Path], packages: Path) -> list[str]:
    """Those that lie outside the folder of Python packages although NVIDIA's packages are installed in it."""
    if not (packages / "nvidia").is_dir():
        return []
    return [str(path) for path in loaded.values() if not path.is_relative_to(packages)]


def _runtime_version(path: Path | None) -> str | None:
    if path is None:
        return None
    number = ctypes.c_int()
    failed = ctypes.CDLL(str(path)).cudaRuntimeGetVersion(ctypes.byref(number))
    return None if failed else dotted(cuda_version(number.value))


def _cublas_version(path: Path | None) -> str | None:
    if path is None:
        return None
    library, parts = ctypes.CDLL(str(path)), []
    for kind in range(3):  # major, minor, patch
        number = ctypes.c_int()
        if library.cublasGetProperty(kind, ctypes.byref(number)):
            return None
        parts.append(str(number.value))
    return ".".join(parts)
