"""How a training step's time and memory grow with one size at a time: plain PEFT beside fastpeft, on a small Llama.

python -m fastpeft.bench.scaling --axis tokens --axis rank --rounds 5 --out runs/bench/scaling.jsonl

`python -m benchmarks report` fits the growth along each axis. Beside it stand the longest context and the largest batch
whose step fits into --memory beside the model: `make gpu` tries them, here they are predicted from that growth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .largest import predicted
from .records import RecordFile, environment
from .report.growth import SUITE
from .steps import Sides, StepCase, build, make_batch, side_by_side
from .timer import ratio

Add = Callable[..., object]
"""Takes the fields of a record."""
Points = dict[str, list[tuple[float, float]]]
"""By peer: (size, bytes at the peak of a step)."""
CONTEXT, BATCH = "longest context", "largest batch"


@dataclass(frozen=True)
class Scales:
    """A case, and by axis the sizes that it takes there while the others stay.

    Attributes:
        case: a Llama with LoRA.
        sizes: of "tokens" (of a row), "rows", "layers", "rank", "vocabulary" and "adapters". Where adapters are counted
            the rows are as many as there are adapters at the most, the tokens of the batch stay, and rows take the
            adapters in turn.
    """

    case: StepCase
    sizes: Mapping[str, tuple[int, ...]]

    def at(self, axis: str, size: int) -> StepCase:
        if axis == "adapters":
            rows = max(self.sizes[axis])
            return replace(self.case, rows=rows, tokens=self.case.rows * self.case.tokens // rows)
        changed: dict[str, Any] = {"words" if axis == "vocabulary" else axis: size}
        return replace(self.case, **changed)


CPU = Scales(
    StepCase("llama", "lora", torch.float32, hidden=256, layers=2, rows=2, tokens=128, words=4000),
    {
        "tokens": (64, 128, 256, 512),
        "rows": (1, 2, 4, 8),
        "layers": (1, 2, 4),
        "rank": (4, 32, 256),
        "vocabulary": (1000, 4000, 16000, 64000),
        "adapters": (1, 2, 4, 8),
    },
)


def measure(scales: Scales, axis: str, rounds: int, add: Add, device: str = "cpu") -> Points:
    """Record time, bytes kept for backward and peak of a step at each size of an axis, and return the peaks."""
    peaks: Points = {}
    for size in scales.sizes[axis]:
        case = scales.at(axis, size)
        sides = _sides(case, size if axis == "adapters" else 0, rounds, device)
        common = {"case": f"{axis} {size}", "op": "step", "settings": settings(case, axis, size)}
        for peer, samples in sides.samples.items():
            add(**common, peer=peer, metric="step time", unit="ms", samples=samples)
        for metric, by_peer in (("kept for backward", sides.kept), ("peak memory", sides.peak)):
            for peer, taken in by_peer.items():
                add(**common, peer=peer, metric=metric, unit="MiB", samples=taken / 2**20)
        for peer, taken in sides.peak.items():
            peaks.setdefault(peer, []).append((size, taken))
        time, memory = ratio(sides.samples, "fastpeft", "peft"), sides.peak["fastpeft"] / sides.peak["peft"]
        print(f"{axis:10} {size:7}  time {time:.3f} of PEFT's, peak {memory:.3f}", flush=True)
    return peaks


def settings(case: StepCase, axis: str, size: int) -> dict[str, Any]:
    """Of a record: what varies and what stays."""
    found = {name: getattr(case, name) for name in ("family", "method", "hidden", "layers", "rows", "tokens", "rank")}
    found |= {"dtype": str(case.dtype)[6:], "vocabulary": case.words, "adapters": 1}
    return {**found, "axis": axis, axis: size}


def _sides(case: StepCase, adapters: int, rounds: int, device: str) -> Sides:
    """Of a batch whose rows take so many adapters in turn, or of an ordinary one for 0."""
    import fastpeft

    model: Any = build(case, device)
    names = ["default", *(f"adapter {i}" for i in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, model.peft_config["default"])
    batch = make_batch(case, device)
    of_rows = [names[i % adapters] for i in range(case.rows)] if adapters else []

    def loss(stepped: nn.Module) -> torch.Tensor:
        mixed = fastpeft.mixed_batch(stepped, of_rows) if adapters else nullcontext()
        with torch.autocast(device, torch.bfloat16, enabled=case.autocast), mixed:
            return stepped(**batch).loss  # type: ignore[no-any-return]

    return side_by_side(model, loss, rounds, device, peak_on_cpu=True)


def keep_largest(add: Add, case: StepCase, metric: str, gib: float, sizes: Mapping[str, float], how: str) -> None:
    """Record by peer what fits, with how that was found."""
    axis = "tokens" if metric == CONTEXT else "rows"
    told = {**settings(case, axis, 0), "memory_gib": gib, "found": how}
    del told[axis], told["axis"]
    for peer, size in sizes.items():
        add(
            case=f"{metric} in {gib:g} GiB", op="step", peer=peer, metric=metric, unit=axis, samples=size, settings=told
        )
    words = ", ".join(f"{peer} {size:.0f}" for peer, size in sizes.items())
    print(f"{metric} whose step fits into {gib:g} GiB beside the model, {how}: {words} {axis}", flush=True)


def main(arguments: Sequence[str] | None = None, scales: Scales = CPU) -> int:
    """Run the command line, on the CPU."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpeft.bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--axis", action="append", choices=list(CPU.sizes), help="more than one may be given; default: all"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory", type=float, default=1.0, metavar="GIB", help="that a step may take beside the model"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scaling.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.unlink(missing_ok=True)
    file = RecordFile(options.out, environment("cpu"))

    def add(settings: Mapping[str, Any], **fields: Any) -> None:
        file.add(suite=SUITE, settings={**settings, "threads": options.threads}, **fields)

    for axis in options.axis or scales.sizes:
        peaks = measure(scales, axis, options.rounds, add)
        if metric := {"tokens": CONTEXT, "rows": BATCH}.get(axis):
            sizes = {peer: predicted(points, options.memory * 2**30) for peer, points in peaks.items()}
            keep_largest(add, scales.case, metric, options.memory, sizes, "predicted from the growth of the peak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
