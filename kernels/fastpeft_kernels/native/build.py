"""Compile and load the C++ library: once a machine, in torch's folder for extensions.

The compiler is called directly, into a temporary file that is then renamed: `torch.utils.cpp_extension.load` would take
a lock in that folder, and a process that is killed while it builds leaves the lock behind for all others to wait on.
The shell that calls the compiler renames the file too: a process that ends meanwhile leaves the result to the next.
The lock here is the kernel's, which nobody who is dead holds: several processes that begin together compile once.
What is loaded runs, so it must be this user's or root's, in a folder that nobody else may write.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from ..common.private import others_may_write, private_folder

logger = logging.getLogger("fastpeft")
SOURCES = ("activation.cpp", "decode.cpp", "dropout.cpp", "loss.cpp", "skinny.cpp")
HEADERS = ("decode_lookup.h", "half.h", "vectors.h")
# Products and sums are rounded one by one, as PyTorch's are.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")
# torch's own libgomp serves, being loaded already: one pool of threads for both. One thread where there is no OpenMP.
THREADS = ("-fopenmp",)
_FINISH = 'umask 077; from=$1 to=$2; shift 2; "$@" && mv -f "$from" "$to"; code=$?; rm -f "$from"; exit $code'


@cache
def native_library() -> ctypes.CDLL | None:
    """The loaded library, or None when it cannot be built here (no C++ compiler, say); says so once.

    The first call on a machine compiles for two or three seconds.
    """
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("the C++ kernels for CPU could not be built, PyTorch serves instead: %s", reason(error))
        return None


@cache
def native_function(library: ctypes.CDLL, name: str, arguments: Sequence[type[Any]]) -> Callable[..., None]:
    """A function of the library that returns nothing, called with arguments of these types of ctypes."""
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    return cast(Callable[..., None], function)


def _built() -> Path:
    # the processor is part of the name: machines with other instruction sets may share a home folder
    about = f"{platform.machine()} {_instruction_sets()}"
    try:
        return built("native", SOURCES, HEADERS, (*FLAGS, *THREADS), about)
    except subprocess.CalledProcessError:
        return built("native", SOURCES, HEADERS, FLAGS, about)


def built(
    name: str,
    sources: Sequence[str],
    headers: Sequence[str],
    flags: Sequence[str],
    about: str,
    last: Sequence[str] = (),
) -> Path:
    """The shared library of these files of this folder, compiled if it is not there yet.

    Args:
        name: what the file's name begins with.
        flags, last: of the compiler, before and after the sources.
        about: whatever else makes the result another one.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: it cannot be compiled here, or others may write there.
    """
    from torch.utils import cpp_extension

    paths = [Path(__file__).with_name(source) for source in sources]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*paths, *map(Path(__file__).with_name, headers))))
    key.update(f"{flags} {last} {about}".encode())
    folder = private_folder(Path(cpp_extension.get_default_build_root()) / "fastpeft")
    library = folder / f"{name}_{key.hexdigest()[:16]}.so"
    if library.exists():
        return _trusted(library)
    with _alone(library.with_suffix(".lock")) as lock:
        if library.exists():  # another process had it compiled meanwhile
            return _trusted(library)
        for left in folder.glob(f".{library.name}-*.tmp"):  # a compiler that is alive would hold the lock
            left.unlink(missing_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{library.name}-", suffix=".tmp", dir=folder)
        os.close(handle)
        try:
            command = [cpp_extension.get_cxx_compiler(), *flags, *map(str, paths), "-o", unfinished, *last]
            _run(["sh", "-c", _FINISH, "sh", unfinished, str(library), *command], lock)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return library


def _trusted(library: Path) -> Path:
    if found := others_may_write(library):
        raise PermissionError(f"{library}: expected a file that only this user may write, got one {found}; delete it")
    return library


def _run(command: list[str], keep: Sequence[int]) -> None:
    # a session of its own: what ends this process by a signal to its group leaves the compiler at work
    said: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
    subprocess.run(command, check=True, timeout=300, start_new_session=True, pass_fds=keep, **said)


@contextmanager
def _alone(path: Path) -> Iterator[tuple[int, ...]]:
    """One process at a time, or all where files cannot be locked; gives what a child needs to hold the lock too."""
    with open(path, "ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield ()
            return
        try:
            yield (file.fileno(),)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have the file open for longer


def _instruction_sets() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def reason(error: Exception) -> str:
    """One line: the first that names an error, since a compiler begins with the files that it came through."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)
