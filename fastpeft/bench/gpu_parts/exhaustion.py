"""Memory that runs out: under a limit a step is run again with the same bits, or the error says what helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.steps import StepCase

order = 57
time_limit_s = 120
needs = ("peft",)


def run(recorder: Recorder, depth: str, small: bool = False) -> None:
    import torch

    from fastpeft.bench.steps import StepCase

    case = StepCase("llama", "lora", torch.bfloat16, 2048, layers=6, rows=4, tokens=2048, autocast=True, dropout=0.05)
    if small:
        case = replace(case, dtype=torch.float32, autocast=False, hidden=256, layers=2, tokens=16)
    checks = (("run again", _run_again), ("what helps", _advice))
    recorder.run_checks("exhaustion", [(name, partial(check, recorder.device, case)) for name, check in checks])


dry_run = partial(run, small=True)


def _run_again(device: str, case: StepCase) -> dict[str, Any]:
    """Two batches accumulated; the second meets a limit between what keeping all takes and recomputing."""
    from fastpeft import LayerPolicy, StepRetry, accelerate, restore
    from fastpeft.bench.gpu_parts.memory import _distance
    from fastpeft.bench.memory import limited
    from fastpeft.bench.steps import build, make_batch

    model, batch = accelerate(build(case, device)), make_batch(case, device)
    one = partial(_forward_and_backward, model, case, batch)
    wanted, again = (_gradients(model, one, one) for _ in range(2))  # the first also finds the siblings
    again, wanted = _gradients(model, one, one), again
    keep = _reserved(device, one)
    accelerate(model, memory=LayerPolicy("recompute"))
    recompute = _reserved(device, one)
    restore(model)
    accelerate(model)
    _gradients(model, one)
    retry = StepRetry(model)
    with limited(device, (keep + recompute) // 2):
        second = one if device == "cuda" else _failing(one, 1)
        found = _gradients(model, lambda: retry(one), lambda: retry(second))
    assert retry.switches, f"nothing ran out: {keep} bytes reserved when all is kept, {recompute} when recomputed"
    for i, (mine, first, other) in enumerate(zip(found, wanted, again, strict=True)):
        distance, usual = _distance(mine, first), _distance(other, first)
        assert distance <= 4 * usual, f"tensor {i} is {distance:.2e} apart, a run without a limit {usual:.2e}"
    return {"kept_mib": keep / 2**20, "recomputed_mib": recompute / 2**20, "switches": ", ".join(retry.switches)}


def _advice(device: str, case: StepCase) -> dict[str, Any]:
    """No policy fits: the error has figures and changes, and the process goes on."""
    import torch

    from fastpeft import StepRetry, accelerate
    from fastpeft.bench.memory import limited
    from fastpeft.bench.steps import build, make_batch
    from fastpeft.memory.exhaustion.out_of_memory import OutOfMemory

    model, batch = accelerate(build(case, device)), make_batch(case, device)
    one = partial(_forward_and_backward, model, case, batch)
    one()
    model.zero_grad(set_to_none=True)
    there = torch.cuda.memory_allocated() if device == "cuda" else 0
    try:
        with limited(device, there + (8 << 20)):
            StepRetry(model)(one if device == "cuda" else _failing(one, 9))
    except OutOfMemory as error:
        said, changes = str(error), error.changes
    else:
        raise AssertionError("nothing ran out")
    assert "not run again: no policy is left that keeps less" in said, said
    assert "predicted, as by fastpeft plan" in said and len(changes) == 3, said
    assert ("reserved by torch" in said) == (device == "cuda"), said
    one()
    return {"said": said[-1500:]}


def _forward_and_backward(model: Any, case: StepCase, batch: dict[str, Any]) -> float:
    import torch

    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=case.autocast):
        loss = model(**batch).loss
    loss.backward()
    return float(loss)


def _gradients(model: Any, *steps: Callable[[], float]) -> list[Any]:
    """Losses and gradients of batches that are accumulated; what is dropped is the same at each call."""
    import torch

    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    losses = [torch.tensor(step()) for step in steps]
    found = [*losses, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def _reserved(device: str, step: Callable[[], float]) -> int:
    """The most that torch's allocator reserved in a step."""
    if device != "cuda":
        return 1
    import torch

    step()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_reserved()


def _failing(step: Callable[[], float], times: int) -> Callable[[], float]:
    """Out of memory so many times, at the end."""
    import torch

    left = iter(range(times))

    def failing() -> float:
        result = step()
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB, in a dry run")
        return result

    return failing
