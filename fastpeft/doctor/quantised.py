"""bitsandbytes: does it load its native library, and does 4-bit storage work on the device that will train?"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastpeft.integrations.versions import check_versions

from .findings import Finding, in_short, note, ok, problem, warning
from .machine import Machine
from .packages import installed

NAME = "bitsandbytes"
_LARGEST_ERROR = 0.16  # of the largest value in a block: half of NF4's widest gap, -1 to -0.696, and some rounding
_GET = "https://huggingface.co/docs/bitsandbytes/main/en/installation"


@dataclass(frozen=True)
class Native:
    """bitsandbytes' native library.

    Attributes:
        file: its name, empty when none could be loaded; `error` says why then.
        cuda: whether it is one for CUDA or ROCm.
    """

    file: str
    cuda: bool
    error: str = ""


def bitsandbytes(machine: Machine) -> Iterator[Finding]:
    """One finding: version, native library, and a small tensor quantised and read back."""
    version = installed(NAME)
    values: dict[str, Any] = {"version": version, "library": None, "cuda": None, "four_bit": None}
    if version is None:
        advice = "Run pip install bitsandbytes: without it no model can be loaded in 4 bits."
        yield warning(NAME, "not installed", advice, **values)
        return
    if machine.torch.error:
        return
    try:
        native = native_library()
    except Exception as error:
        advice = "Reinstall it (pip install --force-reinstall bitsandbytes), or uninstall it, since PEFT imports it."
        yield problem(NAME, f"{version}, cannot be imported: {in_short(error)}", advice, **values)
        return
    wrong = four_bit_error(machine.device)
    values |= {"library": native.file or None, "cuda": native.cuda, "four_bit": not wrong}
    yield _judged(machine, version, native, wrong, values)


def _judged(machine: Machine, version: str, native: Native, wrong: str, values: dict[str, Any]) -> Finding:
    where = "the GPU" if machine.torch.gpus else "the CPU"
    text = f"{version}, {native.file or 'no native library'}"
    if machine.torch.gpus and not native.cuda:
        text = f"{text}: no CUDA library loaded" + (f" ({native.error})" if native.error else "")
        advice = f"Install a release with a library for torch's {_backend(machine)}; {_GET} says how."
        said = f"{text}; 4-bit on {where} " + (f"fails: {wrong}" if wrong else "works nevertheless")
        return (problem if wrong else warning)(NAME, said, advice, **values)
    if wrong:
        advice = (
            "Reinstall it (pip install --force-reinstall bitsandbytes), and run python -m bitsandbytes for details."
        )
        return problem(NAME, f"{text}; 4-bit on {where} fails: {wrong}", advice, **values)
    if old := check_versions([NAME]):
        needs, _, command = old.partition(": ")
        return warning(NAME, f"{text}; {needs}", f"Run {command}.", **values)
    if not native.file:
        advice = "Reinstall it (pip install --force-reinstall bitsandbytes): 4-bit models are slow without its library."
        return note(NAME, f"{text}; 4-bit works on {where} without it", advice, **values)
    return ok(NAME, f"{text}; 4-bit works on {where}", **values)


def _backend(machine: Machine) -> str:
    return f"ROCm {machine.torch.hip}" if machine.torch.hip else f"CUDA {machine.torch.cuda}"


def native_library() -> Native:
    """Import bitsandbytes, silently, and see what it loaded. Raises what its import raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it logs a traceback where its library does not load; we say it in a line
    try:
        from bitsandbytes.cextension import lib
    finally:
        logging.disable(before)
    handle, error = (lib.__dict__.get(name) for name in ("_lib", "error_msg"))  # any other name it would make up
    file = "" if handle is None else str(handle._name).replace("\\", "/").rpartition("/")[2]
    return Native(file, bool(type(lib).compiled_with_cuda), in_short(error or ""))


def four_bit_error(device: str) -> str:
    """Quantise a small matrix to NF4 on a device and read it back; what is wrong, empty when all is well."""
    import torch

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        values = torch.randn(64, 64, device=device)
        packed, state = quantize_4bit(values, blocksize=64, quant_type="nf4")
        error = (dequantize_4bit(packed, state).float() - values).abs().amax(1) / values.abs().amax(1)
        largest = float(error.max())
    except Exception as error:
        return in_short(error)
    return "" if largest <= _LARGEST_ERROR else f"values come back wrong, by up to {largest:.2g} of the block's largest"
