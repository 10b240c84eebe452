"""Compile and load the C++ library: once a machine, in torch's folder for extensions.

The compiler is called directly, into a temporary file that is then renamed: `torch.utils.cpp_extension.load` would take
a lock in that folder, and a process that is killed while it builds leaves the lock behind for all others to wait on.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger("fastpeft")
SOURCES = ("activation.cpp", "decode.cpp", "dropout.cpp", "skinny.cpp")
HEADERS = ("decode_lookup.h", "half.h")
# Products and sums are rounded one by one, as PyTorch's are.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")
# torch's own libgomp serves, being loaded already: one pool of threads for both. One thread where there is no OpenMP.
THREADS = ("-fopenmp",)


@cache
def native_library() -> ctypes.CDLL | None:
    """The loaded library, or None when it cannot be built here (no C++ compiler, say); says so once.

    The first call on a machine compiles for two or three seconds.
    """
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("the C++ kernels for CPU could not be built, PyTorch serves instead: %s", _first_line(error))
        return None


def _built() -> Path:
    from torch.utils import cpp_extension

    sources = [Path(__file__).with_name(name) for name in SOURCES]
    # the processor is part of the name: machines with other instruction sets may share a home folder
    headers = [Path(__file__).with_name(name) for name in HEADERS]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in (*sources, *headers)))
    key.update(f"{FLAGS} {THREADS} {platform.machine()} {_instruction_sets()}".encode())
    folder = Path(cpp_extension.get_default_build_root()) / "fastpeft"
    library = folder / f"native_{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [cpp_extension.get_cxx_compiler(), *FLAGS, *map(str, sources), "-o", unfinished]
        try:
            _run([*command, *THREADS])
        except subprocess.CalledProcessError:
            _run(command)
        os.replace(unfinished, library)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def _instruction_sets() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _first_line(error: Exception) -> str:
    text = (getattr(error, "stderr", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
