"""Triton, and the assembler that it hands its kernels to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .findings import Finding, in_short, note, ok, problem, warning
from .machine import Machine, TorchGpu
from .packages import installed
from .system import dotted

OVERRIDES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")  # which of them counts for sm_90 is Triton's
_WITHOUT_GPU = (90, 100)


def triton(machine: Machine) -> Iterator[Finding]:
    """Triton's version, whether it can be imported, and on a GPU whether a kernel runs and is right.

    `runs` among the values is None where none was tried.
    """
    error = _import_error()
    version = installed("triton") or getattr(sys.modules.get("triton"), "__version__", None)  # triton-windows and such
    if error:
        yield _without(machine, version, error)
    elif not machine.torch.gpus:
        yield ok("triton", f"{version}; kernels wait for a GPU", version=version, runs=None)
    elif wrong := decode_error():
        advice = "Install gcc and Python's headers if a build failed, else reinstall torch and triton together."
        yield problem("triton", f"{version}, but a kernel fails: {wrong}", advice, version=version, runs=False)
    else:
        yield ok("triton", f"{version}; 4-bit decoding compiles, runs and is right", version=version, runs=True)


def _without(machine: Machine, version: str | None, error: str) -> Finding:
    text = f"{version}, cannot be imported: {error}" if version else "not installed"
    values = {"version": version, "runs": None}
    if sys.platform != "linux":
        return note("triton", text, "Nothing to do on this system: PyTorch serves in its place.", **values)
    advice = "Run pip install --force-reinstall triton, in the version that your torch asks for."
    return (warning if machine.torch.gpus else note)("triton", text, advice, **values)


def _import_error() -> str:
    try:
        import triton  # noqa: F401
    except Exception as error:
        return in_short(error)
    return ""


def decode_error() -> str:
    """Run our smallest Triton kernel on the GPU, and compare with PyTorch; empty when all is well."""
    import torch

    from fastpeft_kernels.quant import decode_4bit, encode_4bit

    try:
        packed = encode_4bit(torch.randn(64, 64, device="cuda"), backend="torch")
        same = torch.equal(decode_4bit(packed, backend="triton"), decode_4bit(packed, backend="torch"))
    except Exception as error:
        return in_short(error)
    return "" if same else "its results differ from PyTorch's"


def ptxas(machine: Machine) -> Iterator[Finding]:
    """The assembler for each kind of GPU here, or for all kinds where there is none; nothing without Triton."""
    if _import_error():
        return
    for name in OVERRIDES:
        if finding := _override(name, bool(machine.torch.gpus)):
            yield finding
    kinds = {gpu.capability: gpu for gpu in machine.torch.gpus if gpu.capability}
    for capability in kinds or _WITHOUT_GPU:
        yield _ptxas(capability, kinds.get(capability))


def _override(name: str, used: bool) -> Finding | None:
    """What is wrong with a variable that names an assembler; None when it is unset or right."""
    path = os.environ.get(name)
    if path is None:
        return None
    advice = f"Unset {name}, or let it name a ptxas: the file itself, not its folder."
    if not os.path.exists(path):
        return warning(name, f"{path} does not exist, so Triton silently takes its own ptxas", advice, path=path)
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        text = f"{path} cannot be executed, so Triton compiles no kernel"
        return (problem if used else warning)(name, text, advice, path=path)
    return None


def _ptxas(capability: int, gpu: TorchGpu | None) -> Finding:
    from fastpeft_kernels.common.device import hopper_dots_safe, ptxas_path, ptxas_variable, ptxas_version

    name = f"ptxas sm_{capability}"
    path, version = ptxas_path(capability), ptxas_version(capability)
    values = {"path": path, "version": dotted(version)}
    if path is None or version is None:
        named = [variable for variable in OVERRIDES if variable in os.environ]
        remedy = f"Unset {' and '.join(named)}" if named else "Reinstall triton"
        advice = f"{remedy}: without an assembler no kernel can be compiled for this GPU."
        return (warning if gpu else note)(name, "none that runs", advice, **values)
    text = f"{dotted(version)}, {_origin(path)}"
    if gpu is not None and (reason := hopper_dots_safe(f"cuda:{gpu.index}")):
        text = f"{text}: miscompiles some kernels for this GPU, which are refused ({reason.partition(':')[0]})"
        chosen = ptxas_variable(capability)
        advice = f"Let {chosen} name the ptxas of a newer CUDA toolkit; until then the library serves instead."
        return warning(name, text, advice, **values, safe=False)
    return ok(name, text, **values, safe=True if gpu is not None else None)


def _origin(path: str) -> str:
    import triton

    own = Path(path).is_relative_to(Path(triton.__file__).parent)
    return "Triton's own" if own else path
