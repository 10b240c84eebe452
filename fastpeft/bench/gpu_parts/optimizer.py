"""The optimizer: every bit that of PyTorch's fused AdamW, and what a step takes beside others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.bench.recorder import Check, Recorder

if TYPE_CHECKING:
    import torch

order = 40
time_limit_s = 90

SHAPES = ((16, 4096), (4096, 16), (33, 7), (1,), (3, 130))


def run(recorder: Recorder, depth: str) -> None:
    recorder.run_checks("optimizer", _checks(recorder, {"quick": 7, "default": 20, "full": 60}[depth], 32))


def dry_run(recorder: Recorder, depth: str) -> None:
    recorder.run_checks("optimizer", _checks(recorder, 1, 1))


def _checks(recorder: Recorder, rounds: int, layers: int) -> Iterator[Check]:
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for scaled in (False, True)[: 1 + (dtype != torch.bfloat16)]:  # which torch's scaler does not know
            name = f"bits of torch's fused AdamW, {str(dtype)[6:]}{', scaled gradients' * scaled}"
            yield name, partial(_same, recorder.device, dtype, scaled)
    yield f"step of {layers} layers", partial(_speed, recorder, rounds, layers)


def _same(device: str, dtype: torch.dtype, scaled: bool) -> None:
    """Nine steps, of which the fifth lacks a gradient; with a gradient scaler the seventh overflows."""
    import torch

    from fastpeft.optim import AdamW

    values = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    sides: list[tuple[Any, Any, Any]] = []
    for make in (partial(torch.optim.AdamW, fused=True), AdamW):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        groups = [{"params": parameters[:3], "lr": 1e-2}, {"params": parameters[3:], "weight_decay": 0.0}]
        scaler = torch.amp.GradScaler(device, init_scale=8.0, enabled=scaled)
        sides.append((make(groups), parameters, scaler))
    for step in range(9):
        factor = float("inf") if scaled and step == 6 else 8.0
        gradients = [torch.randn_like(value) * factor for value in values]
        for optimizer, parameters, scaler in sides:
            for i, parameter in enumerate(parameters):
                parameter.grad = None if step == 4 and i == 1 else gradients[i].clone()
            scaler.scale(torch.ones((), device=device))
            scaler.step(optimizer)
            scaler.update()
    (theirs, their_parameters, _), (ours, our_parameters, _) = sides
    assert ours._kept is not None, "the lists were not kept"
    for one, other in zip(their_parameters, our_parameters, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, values[0]) and one.isfinite().all()
        assert all(torch.equal(theirs.state[one][name], ours.state[other][name]) for name in theirs.state[one])


def _speed(recorder: Recorder, rounds: int, layers: int) -> dict[str, Any]:
    from fastpeft.bench.optimizer import measure, table
    from fastpeft.bench.timer import ratio

    result = measure(layers, 16, rounds, recorder.device)
    print(table(result), flush=True)
    case = f"AdamW {layers} layers of Llama 3.1 8B r=16 float32"
    for metric in ("host", "wall", "device"):
        for peer, samples in getattr(result, metric).items():
            recorder.add(case=case, op="optimizer", peer=peer, metric=f"{metric} time", unit="ms", samples=samples)
    for metric in ("temporary", "state"):
        for peer, size in getattr(result, metric).items():
            recorder.add(case=case, op="optimizer", peer=peer, metric=f"{metric} memory", unit="B", samples=float(size))
    peers = ("torch, foreach", "torch, fused")
    return {
        f"{metric}_ratio_{peer.removeprefix('torch, ')}": ratio(getattr(result, metric), "fastpeft", peer)
        for metric in ("host", "wall")
        for peer in peers
    }
