"""How fast data goes between host memory and each GPU: what streamed weights and offloaded optimizers live on."""

from __future__ import annotations

from collections.abc import Iterator

from .findings import Finding, in_short, note, ok, warning
from .machine import Machine, TorchGpu
from .system import SmiGpu

COPIED = 64 * 2**20  # bytes; long enough to hide the launch, short enough for any GPU
_REPEATS = 5
# One lane, one direction, after encoding; from PCI Express 3 on 128 of 130 bits are data, or 236 of 256 bytes.
LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
SLOW = 0.5  # of what the link allows; a healthy one reaches 0.8 or more


def links(machine: Machine) -> Iterator[Finding]:
    """One finding for each GPU that torch sees."""
    for gpu in machine.torch.gpus:
        try:
            speeds = link_speed(gpu.index)
        except RuntimeError as error:
            advice = (
                "Free memory on this GPU and the host; in WSL and containers, allow more locked memory (ulimit -l)."
            )
            yield warning(f"link gpu {gpu.index}", f"not measured: {in_short(error)}", advice)
        else:
            yield _judged(gpu, machine.smi_gpu(gpu), *speeds)


def _judged(gpu: TorchGpu, seen: SmiGpu | None, to_gpu: float, from_gpu: float) -> Finding:
    name = f"link gpu {gpu.index}"
    text = f"{to_gpu:.1f} GB/s to the GPU, {from_gpu:.1f} GB/s back"
    generation, width, now = (seen.generation, seen.width, seen.width_now) if seen else (None, None, None)
    values = {
        "to_gpu_gb_per_s": round(to_gpu, 2),
        "from_gpu_gb_per_s": round(from_gpu, 2),
        "pcie_generation": generation,
        "pcie_lanes": width,
        "pcie_lanes_now": now,
    }
    lane = LANE_GB_PER_S.get(generation or 0)
    if generation is None or not width or lane is None:
        return ok(name, text, **values)
    text = f"{text}; PCIe {generation} x{width}"
    if now and now < width:
        text = f"{text}, x{now} in use"
    if min(to_gpu, from_gpu) < SLOW * lane * width:
        advice = (
            "Look for other work on this GPU, a slot with fewer lanes, or power saving: this link allows twice that."
        )
        return note(name, text, advice, **values)
    return ok(name, text, **values)


def link_speed(index: int) -> tuple[float, float]:
    """(to the GPU, from the GPU) in 1e9 bytes a second: the best of a few copies of COPIED bytes of pinned memory.

    Raises:
        RuntimeError: memory could not be had or pinned, or the GPU failed.
    """
    import torch

    with torch.cuda.device(index):
        host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(COPIED, dtype=torch.uint8, device="cuda")

        def best(target: torch.Tensor, source: torch.Tensor) -> float:
            times = []
            for _ in range(_REPEATS + 1):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                target.copy_(source, non_blocking=True)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            return COPIED / min(times[1:]) / 1e6  # from bytes a millisecond

        return best(there, host), best(host, there)
