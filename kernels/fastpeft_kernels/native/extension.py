"""The C++ that uses torch's own library: a group of LoRA projections (group.cpp), compiled against the torch installed.

torch's headers take the compiler half a minute to a minute. So it works beside the process that first wants the
result, which goes on without, and the file stays for all others, also where that process ends before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import sysconfig
import threading
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from .build import built, reason

logger = logging.getLogger("fastpeft")
NAME = "fastpeft_group"
SOURCES = ("group.cpp",)
HEADERS = ("group.h", "held.h", "mixed.h")
# C++20 is what torch's headers ask for since 2.14.
FLAGS = ("-O1", "-std=c++20", "-DAT_PER_OPERATOR_HEADERS", "-shared", "-fPIC", f"-DTORCH_EXTENSION_NAME={NAME}")
_lock = threading.Lock()
_state: dict[str, Any] = {}


def group_extension(wait: bool = False) -> Any | None:
    """The loaded module, or None: not yet, or it cannot be built here (no C++ compiler, say), which is said once.

    Args:
        wait: until it is there, or cannot be.
    """
    if "module" in _state:
        return _state["module"]
    with _lock:
        thread = _state.get("thread")
        if thread is None:
            # a daemon: a process that ends before is not held up
            thread = _state["thread"] = threading.Thread(target=_build, name="fastpeft builds C++", daemon=True)
            thread.start()
    if wait:
        thread.join()
    return _state.get("module")


def _begin_in_child() -> None:
    """A forked process has no thread of its parent's, and a lock that one of them may have held."""
    global _lock
    _lock = threading.Lock()
    _state.pop("thread", None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


def _build() -> None:
    try:
        _state["module"] = _load(_path())
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        logger.warning("the C++ for groups of projections could not be built, Python serves: %s", reason(error))
        _state["module"] = None


def _path() -> Path:
    from torch.utils import cpp_extension

    include = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    flags = (
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *[f"-I{path}" for path in include],
    )
    about = f"{torch.__version__} {sys.version} {sysconfig.get_platform()}"
    return built("group", SOURCES, HEADERS, flags, about, libraries)


def _load(path: Path) -> Any:
    loader = ExtensionFileLoader(NAME, str(path))
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
