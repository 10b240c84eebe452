"""Memory policies of a whole model beside transformers' own checkpointing: the same bits, time and peak of a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.steps import StepCase

order = 62
time_limit_s = 300
needs = ("peft",)
KEEP, WITHOUT = "fastpeft, keep", "fastpeft, no policy"


def run(recorder: Recorder, depth: str, small: bool = False) -> None:
    found = cases(small)
    recorder.run_checks("memory", ((case.name, partial(_case, recorder, case, depth)) for case in found))


dry_run = partial(run, small=True)


def cases(small: bool) -> Iterator[StepCase]:
    """Decoders whose layers are those of a large one, or small ones."""
    import torch

    from fastpeft.bench.steps import StepCase

    case = StepCase("llama", "lora", torch.bfloat16, hidden=4096, layers=6, rows=2, tokens=4096, autocast=True)
    if small:
        case = replace(case, dtype=torch.float32, autocast=False, hidden=64, layers=3, tokens=16)
    yield case
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield replace(case, method="qlora")
        yield replace(case, method="qlora", dropout=0.05)


def _case(recorder: Recorder, case: StepCase, depth: str) -> dict[str, float]:
    from fastpeft.bench.memory import peak_of_step
    from fastpeft.bench.steps import build, make_batch
    from fastpeft.bench.timer import interleaved, ratio

    batch = make_batch(case, recorder.device)
    steps = {
        peer: partial(_step, model, case, batch) for peer, model in _peers(build(case, recorder.device), case).items()
    }
    for step in steps.values():
        step()  # finds the siblings
    _check_bits(steps)
    rounds = 2 if recorder.device == "cpu" else {"quick": 5, "default": 10, "full": 25}[depth]
    samples = interleaved(steps, rounds, device=recorder.device)
    for peer, taken in samples.items():
        recorder.add(case=case.name, op="memory", peer=peer, metric="step time", unit="ms", samples=taken)
    if recorder.device == "cuda":
        for peer, step in steps.items():
            peak = peak_of_step(step) / 2**20
            recorder.add(case=case.name, op="memory", peer=peer, metric="peak memory", unit="MiB", samples=peak)
    return {f"time_ratio_{peer.split(', ')[1]}": ratio(samples, peer, KEEP) for peer in steps if peer != KEEP}


def _peers(model: Any, case: StepCase) -> dict[str, Any]:
    """Accelerated copies, each with another way to keep less; transformers' where it has it."""
    import copy
    import inspect

    import fastpeft
    from fastpeft import LayerPolicy, MemoryPolicy
    from fastpeft.memory.policy import ACTIVATIONS

    found = {WITHOUT: fastpeft.accelerate(copy.deepcopy(model))}  # what "keep" costs beside it is a policy's own cost
    found |= {
        f"fastpeft, {how}": fastpeft.accelerate(copy.deepcopy(model), memory=LayerPolicy(how)) for how in ACTIVATIONS
    }
    if case.method == "qlora":
        kept = MemoryPolicy(LayerPolicy("recompute"), decoded=1 << 30)
        found["fastpeft, recompute with decoded weights"] = fastpeft.accelerate(copy.deepcopy(model), memory=kept)
    theirs = fastpeft.accelerate(copy.deepcopy(model))
    theirs.enable_input_require_grads()
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    found["transformers, checkpointing"] = theirs
    enable = getattr(model.get_base_model(), "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        print("this transformers offloads no activations: it is not measured")
        return found
    if model.device.type == "cpu":
        print("transformers' offloading wants memory that can be pinned: it is not measured here")
        return found
    offloading = fastpeft.accelerate(copy.deepcopy(model))
    offloading.enable_input_require_grads()
    offloading.get_base_model().activation_checkpointing_enable(offload=True)
    found["transformers, offloading"] = offloading
    return found


def _step(model: Any, case: StepCase, batch: dict[str, Any]) -> list[Any]:
    """Loss and gradients; what is dropped is the same at each call."""
    import torch

    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=case.autocast):
        loss = model(**batch).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return found


def _check_bits(steps: dict[str, Any]) -> None:
    """Under every policy of ours what keeping all gives; as near as that comes to itself where it differs each time."""
    wanted, again = steps[KEEP](), steps[KEEP]()
    spread = [_distance(one, other) for one, other in zip(wanted, again, strict=True)]
    for peer, step in steps.items():
        if not peer.startswith("fastpeft"):
            continue
        for i, (mine, other, usual) in enumerate(zip(step(), wanted, spread, strict=True)):
            distance = _distance(mine, other)
            assert distance <= 4 * usual, (
                f"{peer}: tensor {i} is {distance:.2e} from {KEEP}, which is {usual:.2e} apart"
            )


def _distance(one: Any, other: Any) -> float:
    """Relative, in norm; 0 for the same bits."""
    found: float = (one.double() - other.double()).norm().item()
    return found / (other.double().norm().item() or 1.0)
