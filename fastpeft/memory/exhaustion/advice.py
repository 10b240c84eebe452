"""What to say when memory ran out: what is allocated, what was predicted beside it, and what would need less."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...layers.random_state import RandomState, devices_of
from ..plan.choosing import Need, need
from ..plan.given import Given
from ..plan.loaded import model_of_loaded
from ..plan.optimizer_state import OPTIMIZERS, state_sizes
from ..plan.planning import components
from ..plan.predicting import Model
from ..plan.timing import Rates
from ..policy import ACTIVATIONS, MemoryPolicy
from ..sizes import mib_or_gib
from .ladder import current_policy, level_text
from .out_of_memory import Call, OutOfMemory, Phase, asked_bytes, phase_of

MOST_CHANGES = 3
EIGHT_BIT = "adamw_8bit"


@dataclass(frozen=True)
class Change:
    """Something that would need less memory.

    Attributes:
        text: what to do, and what it costs.
        frees: bytes; None where nothing was predicted.
    """

    text: str
    frees: int | None = None

    def __str__(self) -> str:
        return self.text if self.frees is None else f"{self.text}: about {mib_or_gib(self.frees)} less"


def explained(error: BaseException, model: nn.Module, call: Call, optimizer: str, *notes: str) -> OutOfMemory:
    """The error to raise in place of another.

    Args:
        call: the model's last one.
        optimizer: one of `optimizer_state.OPTIMIZERS`.
        notes: lines to end with.
    """
    asked, phase, device = asked_bytes(error), phase_of(error, call), _device(model)
    lines = [str(error).strip(), "", f"fastpeft: memory ran out in {_where(phase, call)}"]
    lines += _table(allocation(device))
    changes: list[Change] = []
    if phase == "forward pass without gradients":
        changes = _without_gradients(call)
        lines += ["no prediction: evaluation is not predicted"]
    else:
        try:
            predicted, changes = prediction(model, call, optimizer, device, asked)
            lines += predicted
        except Exception as failed:  # whatever it is, the original error counts
            lines += [f"no prediction: {type(failed).__name__}: {' '.join(str(failed).split())[:200]}"]
            changes = _unpredicted(model, call, optimizer)
    lines += ["what would need less, the cheapest first:", *(f"  {change}" for change in changes)]
    made = OutOfMemory("\n".join([*lines, *notes]))
    made.phase, made.asked, made.changes = phase, asked, tuple(map(str, changes))
    return made


def allocation(device: torch.device) -> dict[str, int]:
    """Bytes on a GPU, as torch and the driver count them; empty for other devices."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {
        "GPU memory": total,
        "free": free,
        "reserved by torch": torch.cuda.memory_reserved(device),
        "of it allocated": torch.cuda.memory_allocated(device),
        "at the most so far": torch.cuda.max_memory_allocated(device),
    }


def prediction(
    model: nn.Module, call: Call, optimizer: str, device: torch.device, asked: int | None
) -> tuple[list[str], list[Change]]:
    """A plan's components for a model as it is, and what would need less. Takes no memory of a GPU.

    Raises:
        ValueError: not a transformers model with LoRA that was called with token ids, or with something to see or hear.
        Exception: whatever `plan` meets.
    """
    if call.rows is None or call.tokens is None:
        raise ValueError("the model was not called with input_ids of rows x tokens")
    capacity = _capacity(device)
    with _undisturbed(model):
        traced = model_of_loaded(model, call.tokens, call.rows, optimizer, given=call.given)[1]
        now = need(traced, current_policy(model), call.rows, call.tokens, capacity, Rates())
        changes = list(_changes(traced, now, call.rows, call.tokens, capacity))
    found = components(traced, now, capacity)
    lines = ["predicted, as by fastpeft plan for a GPU:"]
    lines += _table(dict(list(found.items())[: list(found).index("total") + 1]))
    enough = [change for change in changes if (change.frees or 0) >= (asked or 0)]
    return lines, (enough + [change for change in changes if change not in enough])[:MOST_CHANGES]


def _changes(model: Model, now: Need, rows: int, tokens: int, capacity: int) -> Iterator[Change]:
    """The cheapest first: what costs nothing, little accuracy, time, and then data."""
    if rows > 1:
        yield Change(_fewer_rows(rows), now.step * (rows - rows // 2) // rows)
    optimizer = model.setting.optimizer
    state, smaller = (_state_bytes(model.skeleton.model, name) for name in (optimizer, EIGHT_BIT))
    if state > smaller:  # of the traced layers, which stand for all
        yield Change(_smaller_optimizer(optimizer), int(model.optimizer * (1 - smaller / state)))
    yield from _other_policies(model, now, rows, tokens, capacity, ("recompute", "offload"))
    if (given := model.setting.given) is not None:
        yield Change(_less_of(given))
    elif tokens > 1:
        yield Change(f"rows of {tokens // 2} tokens rather than {tokens}, which cuts longer ones", now.step // 2)
    yield from _other_policies(model, now, rows, tokens, capacity, ("streamed",))


def _other_policies(
    model: Model, now: Need, rows: int, tokens: int, capacity: int, levels: tuple[str, ...]
) -> Iterator[Change]:
    for level in levels:
        policy = _at_least(now.policy, len(model.skeleton.order), level)
        other = need(model, policy, rows, tokens, capacity, Rates())
        if other.total < now.total:
            times = max(1.0, other.slowdown / now.slowdown)
            yield Change(f"{_policy_text(level)}, {times:.2f} times the time of a step", now.total - other.total)


def _at_least(policy: MemoryPolicy, count: int, level: str) -> MemoryPolicy:
    """Layers that keep no more than `level` says."""
    least = ACTIVATIONS.index("offload" if level == "streamed" else level)  # type: ignore[arg-type]
    layers = tuple(
        replace(
            each,
            activations=ACTIVATIONS[max(least, ACTIVATIONS.index(each.activations))],
            streamed=each.streamed or level == "streamed",
        )
        for each in policy.of(count)
    )
    return replace(policy, layers=layers)


def _unpredicted(model: nn.Module, call: Call, optimizer: str) -> list[Change]:
    """The same without figures of a step."""
    changes = [Change(_fewer_rows(call.rows))] if call.rows is None or call.rows > 1 else []
    level = level_text(current_policy(model))
    changes += [Change(_policy_text("recompute" if "keep" in level else "offload"))] if level else []
    spared = _state_bytes(model, optimizer) - _state_bytes(model, EIGHT_BIT) if optimizer in OPTIMIZERS else 0
    if spared > 0:
        changes.append(Change(_smaller_optimizer(optimizer), spared))
    return [*changes, Change(_less_of(call.given))][:MOST_CHANGES]


def _state_bytes(model: nn.Module, optimizer: str) -> int:
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return sum(sum(state_sizes(optimizer, elements)) for elements in trained)


def _without_gradients(call: Call) -> list[Change]:
    rows = "fewer" if call.rows is None else f"fewer than {call.rows}"
    return [
        Change(f"{rows} rows a forward pass (per_device_eval_batch_size), for the same result"),
        Change("results brought to the host in between (eval_accumulation_steps), or the loss alone kept of them"),
        Change(_less_of(call.given)),
    ]


def _less_of(given: Given | None) -> str:
    if given is None:
        return "shorter rows, which cuts longer ones"
    return "shorter recordings" if given.hears else "fewer pictures a row, or smaller ones"


def _fewer_rows(rows: int | None) -> str:
    what = "a smaller batch" if rows is None else f"batch {rows // 2} rather than {rows}"
    return f"{what} with more gradient accumulation, for the same result"


def _smaller_optimizer(optimizer: str) -> str:
    return f"{EIGHT_BIT} rather than {optimizer}, for a little accuracy"


def _policy_text(level: str) -> str:
    if level == "streamed":
        return 'streamed layers (LayerPolicy("offload", streamed=True))'
    return f'activations that are not kept (LayerPolicy("{level}"))'


def _table(sizes: dict[str, int]) -> list[str]:
    return [f"  {name:24}{mib_or_gib(size):>14}" for name, size in sizes.items() if size]


def _where(phase: Phase, call: Call) -> str:
    article = "an" if phase.startswith("o") else "a"
    size = "" if call.rows is None or phase == "optimizer step" else f" of {call.rows} rows"
    if size and (call.given is None or call.given.written is not None):
        size += f" of {call.tokens} tokens"
    return f"{article} {phase}{size}"


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _capacity(device: torch.device) -> int:
    """Of the GPU; of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Planning as it is by itself: with gradients, without a word, and without a trace in random numbers."""
    generators, quiet = RandomState(devices_of(model)), logging.getLogger("fastpeft")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        quiet.setLevel(level)
        generators.put_back()
