"""What the device and the tools beside it can do. Asked when an op is called, never at import."""

from __future__ import annotations

import re
import subprocess
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from .shapes import imitated

# Assemblers before this one miscompile, for sm_90, chained dots: a dot's result that is cast and fed to another dot.
_FIRST_SAFE_PTXAS = (13, 3)


@lru_cache(maxsize=1)
def triton_available() -> bool:
    """Whether Triton can be imported. Imports it at the first call."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def triton_serves(device: torch.device) -> bool:
    """Whether our Triton kernels can be compiled and launched on `device`; tried once a process and GPU."""
    if device.type != "cuda" or not triton_available():
        return False
    return _triton_launches(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _triton_launches(index: int) -> bool:
    from .triton_trial import launches

    return launches(index)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast would multiply on `device` at present; None where it is off."""
    kind = _autocasting(device)
    return None if kind is None else torch.get_autocast_dtype(kind)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Within it no autocast on `device`."""
    kind = _autocasting(device)
    if kind is None:
        return nullcontext()
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _AutocastOff(kind)


class _AutocastOff:
    """`torch.autocast(kind, enabled=False)` where it is on, in a third of the host's time: nothing else is changed."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


def _autocasting(device: torch.device) -> str | None:
    """Whose autocast is on for tensors on `device`; a model without values is told by the CPU's."""
    kind = device.type
    if kind == "meta":  # asked of it, torch raises
        if imitated(device) is None:
            return None
        kind = "cpu"
    return kind if torch.is_autocast_enabled(kind) else None


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which to multiply matrices of `dtype` on `device`, to be rounded to `dtype` afterwards.

    fp32 in place of 16 bits on a CPU without instructions for those, where torch falls back to loops that run at a
    tenth of fp32's rate (forward) to a hundredth (backward); else `dtype` itself.
    """
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 and _slow_on_cpu(dtype) else dtype


@lru_cache
def _slow_on_cpu(dtype: torch.dtype) -> bool:
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return not getattr(torch.ops.mkldnn, name)()
    except (AttributeError, RuntimeError):  # a build without oneDNN: not known, so nothing is changed
        return False


def device_capability(device: torch.device | str) -> int | None:
    """Compute capability of an NVIDIA GPU as one number.

    Args:
        device: any torch device; "cuda" without an index is the current one.

    Returns:
        10 * major + minor, so 90 for sm_90; None for a device that is not an NVIDIA GPU.
    """
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def ptxas_path(capability: int) -> str | None:
    """Path of the assembler that Triton uses for sm_`capability`; None without Triton or its NVIDIA backend."""
    if not triton_available():
        return None
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(capability).path)
    except (ImportError, RuntimeError, OSError):  # OSError: the user's variable names no program
        return None


def ptxas_variable(capability: int = 90) -> str:
    """The environment variable by which a user chooses Triton's assembler for sm_`capability`.

    The one that is named for Blackwell counts from sm_100 on, and since Triton 3.9 from sm_90 on.
    """
    try:
        from triton import knobs

        second = ptxas_path(capability) == str(knobs.nvidia.ptxas_blackwell.path)
    except (ImportError, AttributeError, RuntimeError, OSError):
        second = False
    return "TRITON_PTXAS_BLACKWELL_PATH" if second else "TRITON_PTXAS_PATH"


def ptxas_version(capability: int = 90) -> tuple[int, int] | None:
    """(major, minor) of the assembler that Triton uses for sm_`capability`; None where there is none."""
    path = ptxas_path(capability)
    return None if path is None else _version_of(path)


@lru_cache
def _version_of(path: str) -> tuple[int, int] | None:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", answer)
    return None if release is None else (int(release[1]), int(release[2]))


def hopper_dots_safe(device: torch.device | str, proved: tuple[tuple[int, int], ...] = ()) -> str | None:
    """Why a kernel with register-operand or chained dots must not run on `device`; None when it may.

    Args:
        proved: older assemblers, (major, minor), with which this kernel was held to fp64 on such a GPU.

    Returns:
        One sentence for the report, or None. Only sm_90 is affected, with an assembler older than 13.3.
    """
    if device_capability(device) != 90:
        return None
    version = ptxas_version(90)
    if version is not None and (version >= _FIRST_SAFE_PTXAS or version in proved):
        return None
    found = "no ptxas was found" if version is None else f"Triton uses ptxas {version[0]}.{version[1]}"
    needed = ".".join(map(str, _FIRST_SAFE_PTXAS))
    chosen = ptxas_variable(90)
    return f"on sm_90 chained dots need ptxas {needed} or newer, and {found}: a newer one is chosen by {chosen}"


def holds_huge_tensors() -> bool:
    """Whether the current GPU has room for checks on tensors of more than 2**31 elements, several at a time."""
    return torch.cuda.get_device_properties().total_memory >= 40 * 2**30
