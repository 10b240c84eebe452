"""The computer around the GPU: system, Python, memory, disks, compilers."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .findings import Finding, gib, in_short, note, ok, warning
from .machine import Machine
from .system import answer

GIB = 2**30
LEAST_RAM = 4 * GIB  # a shard of a checkpoint, and the process around it
LEAST_WORKING_DISK = 2 * GIB  # adapters, optimizer states and logs of one run
LEAST_CACHE_DISK = 20 * GIB  # a 7B checkpoint in 16 bits
COMPILER_LIMIT_S = 10.0
_CGROUPS = Path("/sys/fs/cgroup")


def system() -> Iterator[Finding]:
    """The operating system, and what it rules out."""
    kind, kernel = platform.system(), platform.release()
    wsl = 0 if kind != "Linux" or "microsoft" not in kernel.lower() else 2 if "WSL2" in kernel else 1
    name = {"Darwin": "macOS, Darwin"}.get(kind, kind)
    text = f"{name} {kernel} {platform.machine()}" + (f", WSL {wsl}" if wsl else "")
    values = {"kind": kind, "release": kernel, "machine": platform.machine(), "wsl": wsl}
    if wsl == 1:
        yield warning("system", text, "Convert to WSL 2 (wsl --set-version): WSL 1 reaches no GPU.", **values)
    elif kind == "Windows":
        advice = "Use WSL 2 for Triton, which has no official build for Windows; PyTorch does all work here."
        yield note("system", text, advice, **values)
    elif kind != "Linux":
        advice = (
            "Use Linux with an NVIDIA GPU for speed; here there is no Triton, and PyTorch does all work on the CPU."
        )
        yield note("system", text, advice, **values)
    else:
        yield ok("system", text, **values)


def python() -> Iterator[Finding]:
    version, kind = platform.python_version(), platform.python_implementation()
    isolated = sys.prefix != sys.base_prefix
    text = f"{kind} {version}, {'in a virtual environment' if isolated else 'no virtual environment'}"
    yield ok("python", text, version=version, implementation=kind, virtual_environment=isolated)


def ram() -> Iterator[Finding]:
    """Host memory that a new process can get, within the limits of a container."""
    total, available = available_ram()
    text = f"{gib(available)} available of {gib(total)}"
    values = {"available_bytes": available, "total_bytes": total}
    if available < LEAST_RAM:
        advice = f"Free memory or raise the container's limit: loading a model wants {gib(LEAST_RAM)} or more."
        yield warning("ram", text, advice, **values)
    else:
        yield ok("ram", text, **values)


def available_ram() -> tuple[int, int]:
    """(total, available) in bytes: the machine's, or those of the narrowest control group around this process."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    else:
        import psutil  # type: ignore[import-untyped]

        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
    for limit, used in _group_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _group_limits(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group around this process that limits memory.

    Cached file contents that were not read lately count as free: the kernel drops them before it runs out.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in lines:
        if number == "0":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            if not group.is_relative_to(top):
                break
            try:
                limit = (group / names[0]).read_text().strip()
                used = int((group / names[1]).read_text())
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # the root group, or one that the container does not see
            if limit != "max":
                yield int(limit), used - int(counts.get(names[2], 0))


def disks() -> Iterator[Finding]:
    """Room where results and checkpoints go."""
    yield _disk("disk here", Path.cwd(), LEAST_WORKING_DISK, "results of a run")
    yield _disk("disk cache", hub_cache(), LEAST_CACHE_DISK, "checkpoints from the hub")


def hub_cache() -> Path:
    """The folder in which huggingface_hub keeps checkpoints; need not exist."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path("~/.cache/huggingface/hub").expanduser()
    return Path(HF_HUB_CACHE)


def _disk(name: str, folder: Path, least: int, purpose: str) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
    where = "the working folder" if name == "disk here" else str(folder)
    values = {"free_bytes": free, "writable": writable}
    if not writable:
        advice = f"Make {where} writable, or choose another folder, for {purpose}."
        return warning(name, f"{where} cannot be written to", advice, **values)
    if free < least:
        advice = f"Free some space for {purpose}: {gib(least)} is what is comfortable."
        return note(name, f"{gib(free)} free in {where}", advice, **values)
    return ok(name, f"{gib(free)} free in {where}", **values)


def compilers(machine: Machine) -> Iterator[Finding]:
    """C++ for our CPU library; C and Python's headers for Triton, which builds a launcher when first used on a GPU."""
    cxx, ninja = os.environ.get("CXX", "cl" if sys.platform == "win32" else "c++"), _ninja()
    try:
        release = in_short(answer(cxx, "--version", limit_s=COMPILER_LIMIT_S))
    except (OSError, RuntimeError, TimeoutError):
        release = ""
    missing = "CXX names no C++ compiler" if "CXX" in os.environ else "no C++ compiler"
    text = f"{release or missing}; ninja {'found' if ninja else 'not found (nothing here needs it)'}"
    values = {"cxx": release or None, "ninja": ninja}
    if release and sys.platform != "win32":
        yield ok("compiler", text, **values)
    else:
        advice = (
            "Install g++ or clang++ if you train on the CPU with dropout, which PyTorch then does slower."
            if sys.platform != "win32"
            else "Nothing to do: the C++ dropout for CPUs is not built on Windows, and PyTorch does it."
        )
        yield note("compiler", text, advice, **values)
    if machine.torch.gpus and sys.platform == "linux":
        yield _triton_builds()


def _triton_builds() -> Finding:
    cc = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as Triton does
    headers = Path(sysconfig.get_path("include", scheme), "Python.h").exists()
    missing = [*([] if cc else ["a C compiler"]), *([] if headers else ["Python's headers"])]
    values = {"cc": cc is not None, "python_headers": headers}
    if not missing:
        return ok("compiler c", "a C compiler and Python's headers, which Triton needs", **values)
    advice = "Install gcc and python3-dev (or your system's names for them): Triton and torch.compile build with them."
    return warning("compiler c", f"{' and '.join(missing)} not found", advice, **values)


def _ninja() -> bool:
    """On the path, or beside this Python, whose folder is not on it where the environment was not activated."""
    return bool(shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts")))
