"""GPUs, their driver, and whether torch and they fit each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from fastpeft.integrations.versions import check_versions

from .findings import Finding, gib, note, ok, problem, warning
from .machine import Machine
from .system import dotted, parsed

OLDEST_CAPABILITY = 75  # the oldest that the kernels are compiled for
GET_TORCH = "https://pytorch.org/get-started/locally/"
GET_DRIVER = "https://www.nvidia.com/drivers"


def gpus(machine: Machine) -> Iterator[Finding]:
    """One finding a GPU, as torch sees them; as nvidia-smi does where torch sees none."""
    if machine.torch.gpus:
        for gpu in machine.torch.gpus:
            yield _gpu(gpu.index, gpu.name, gpu.capability, gpu.total_bytes, gpu.free_bytes, machine.torch.hip)
    elif machine.smi.gpus:
        for index, seen in enumerate(machine.smi.gpus):
            yield _gpu(index, seen.name, seen.capability, seen.total_bytes, seen.free_bytes, None)
    elif machine.smi.hangs:
        advice = "Restart the machine, or its driver: it is stuck, and anything that asks it for a GPU will be too."
        yield problem("gpu", machine.smi.error, advice)
    elif machine.smi.error or machine.device_node or machine.on_bus:
        undriven = machine.on_bus and not machine.device_node
        text = (
            "no driver answers for the one that is plugged in" if undriven else "neither nvidia-smi nor torch shows one"
        )
        advice = f"Install NVIDIA's driver ({GET_DRIVER}) if there is a GPU, or start the container with --gpus all."
        yield warning("gpu", f"{text} ({machine.smi.error})" if machine.smi.error else text, advice)
    else:
        advice = "Nothing to do for small models, which train on the CPU; large ones want an NVIDIA GPU."
        yield note("gpu", "none", advice)


def _gpu(
    index: int, name: str, capability: int | None, total: int | None, free: int | None, hip: str | None
) -> Finding:
    words = [name, f"capability {capability / 10}" if capability else "AMD" if hip else "capability unknown"]
    words.append(
        f"{gib(total)}, {'unknown' if free is None else gib(free)} free" if total else "memory shared or unknown"
    )
    title, text = f"gpu {index}", ", ".join(words)
    values = {
        "name": name,
        "capability": None if capability is None else str(capability / 10),
        "total_bytes": total,
        "free_bytes": free,
    }
    if hip:
        advice = "Expect the PyTorch path, and check with fastpeft.verify: nothing has been tried on AMD GPUs."
        return note(title, text, advice, **values)
    if capability is not None and capability < OLDEST_CAPABILITY:
        advice = (
            f"Use a GPU of capability {OLDEST_CAPABILITY / 10} or later: nothing is compiled or tested for older ones."
        )
        return warning(title, text, advice, **values)
    if total and free is not None and free < total / 2:
        advice = "End what else runs on this GPU (nvidia-smi lists it): more than half of its memory is taken."
        return note(title, text, advice, **values)
    return ok(title, text, **values)


def driver(machine: Machine) -> Iterator[Finding]:
    """The NVIDIA driver and the CUDA that it supports; nothing where there is no driver."""
    if not (machine.smi.driver or machine.driver_cuda):
        return
    cuda = dotted(machine.driver_cuda)
    text = f"{machine.smi.driver or 'version unknown'}, for CUDA up to {cuda or 'unknown'}"
    values = {"version": machine.smi.driver, "cuda": cuda}
    if machine.smi.error and machine.torch.gpus:
        advice = "Restart the machine if GPUs misbehave: the driver's own tool does not work."
        yield warning("driver", f"{text}; {machine.smi.error}", advice, **values)
    else:
        yield ok("driver", text, **values)


def torch_build(machine: Machine) -> Iterator[Finding]:
    """torch, what it was built for, and whether it can use the GPUs that are there."""
    torch = machine.torch
    values = {
        "version": torch.version or None,
        "cuda": torch.cuda,
        "hip": torch.hip,
        "gpus": len(torch.gpus),
    }
    if torch.error:
        yield problem("torch", torch.error, f"Install torch anew: {GET_TORCH} gives the command.", **values)
        return
    built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPUs only"
    sees = f"sees {len(torch.gpus)} GPU{'' if len(torch.gpus) == 1 else 's'}" if torch.gpus else "sees no GPU"
    text = f"{torch.version}, built for {built}, {sees}"
    if old := check_versions(["torch"]):
        needs, _, command = old.partition(": ")
        yield problem("torch", f"{text}; {needs}", f"Run {command}.", **values)
    elif torch.gpus:
        yield _used(machine, text, values)
    elif machine.has_gpu:
        yield _unused(machine, text, values)
    else:
        yield ok("torch", text, **values)


def _unused(machine: Machine, text: str, values: dict[str, Any]) -> Finding:
    """There is a GPU, and torch sees none."""
    torch, supported, built = machine.torch, machine.driver_cuda, parsed(machine.torch.cuda)
    if torch.cuda is None and torch.hip is None:
        upto = f" {dotted(supported)} or older" if supported else ""
        advice = f"Install a build of torch for CUDA{upto}: {GET_TORCH} gives the command."
        return problem("torch", f"{text}, though there is one", advice, **values)
    if supported and built and supported[0] < built[0]:
        text = f"{text}: the driver is too old, it supports CUDA up to {dotted(supported)}"
        advice = f"Update the driver ({GET_DRIVER}), or install a build of torch for CUDA {supported[0]} ({GET_TORCH})."
        return problem("torch", text, advice, **values)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        advice = "Unset CUDA_VISIBLE_DEVICES, or name GPUs that exist, to train on a GPU."
        return note("torch", f"{text}: CUDA_VISIBLE_DEVICES={hidden!r} hides them", advice, **values)
    said = f": {torch.complaint}" if torch.complaint else ""
    advice = "Restart the machine, then reinstall driver and torch: they do not work together."
    return problem("torch", f"{text}, though there is one{said}", advice, **values)


def _used(machine: Machine, text: str, values: dict[str, Any]) -> Finding:
    """torch sees GPUs; has it kernels for them, and is the driver as new as its CUDA?"""
    torch, supported, built = machine.torch, machine.driver_cuda, parsed(machine.torch.cuda)
    without = [gpu for gpu in torch.gpus if gpu.capability and not _compiled_for(gpu.capability, torch.architectures)]
    if without:
        names = ", ".join(f"gpu {gpu.index} (capability {(gpu.capability or 0) / 10})" for gpu in without)
        advice = f"Install a build of torch that has them: {GET_TORCH} gives the command."
        return problem("torch", f"{text}, but has no kernels for {names}", advice, **values)
    if supported and built and supported < built:
        text = f"{text}; the driver supports CUDA up to {dotted(supported)}"
        return note("torch", text, f"Update the driver if a kernel fails to load; {GET_DRIVER} has it.", **values)
    return ok("torch", text, **values)


def _compiled_for(capability: int, architectures: tuple[str, ...]) -> bool:
    """Machine code runs on later GPUs of its generation, PTX ("compute") on all later ones, "a" on no later one."""
    if not architectures:
        return True  # it does not say
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name)
        if found is None:
            continue
        kind, number, special = found[1], int(found[2]), found[3]
        later = capability >= number and (kind == "compute" or capability // 10 == number // 10)
        if capability == number or (later and special != "a"):
            return True
    return False


def bf16(machine: Machine) -> Iterator[Finding]:
    """Whether bf16 is computed by the hardware, on each GPU or on the CPU."""
    torch = machine.torch
    if torch.gpus:
        emulated = [gpu.index for gpu in torch.gpus if gpu.capability is not None and gpu.capability < 80]
        if emulated:
            which = ", ".join(f"gpu {index}" for index in emulated)
            advice = "Train in float16 there (TrainingArguments(fp16=True)): bfloat16 needs capability 8.0."
            yield note("bf16", f"emulated on {which}", advice, native=False)
        else:
            yield ok("bf16", "native", native=True)
    elif torch.version:
        yield _cpu_bf16()


def _cpu_bf16() -> Finding:
    import torch

    ask = getattr(torch.cpu, "get_capabilities", dict)
    found = [name for name, able in ask().items() if able and name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")]
    if found:
        return ok("bf16", f"native on the CPU ({', '.join(found)})", native=True)
    advice = "Train in float32 on this CPU unless bfloat16 proves to be faster: it has no instructions for it."
    return note("bf16", "emulated on the CPU", advice, native=False)
