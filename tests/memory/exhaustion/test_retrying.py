"""A training in which memory ran out is, bit for bit, the one in which it did not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy, StepRetry
from fastpeft.memory.exhaustion.ladder import current_policy, level_text
from fastpeft.memory.exhaustion.out_of_memory import OutOfMemory
from fastpeft.memory.layers import model_layers
from tests.integration.models import batch, checkpointed, make
from tests.memory.exhaustion.exhausted import Exhausted

LEVELS = ["selective", "recompute", "offload"]
MICRO_STEPS = 4
Fails = dict[tuple[int, int], float]


@dataclass
class Training:
    """One of MICRO_STEPS batches.

    Attributes:
        fails: (batch, attempt) -> the part of the attempt's operations that are done when memory runs out.
        operations: of an attempt, by what layers do.
        leaked: tensors of failed attempts that were alive in the next ones.
    """

    model: nn.Module
    accumulate: int = MICRO_STEPS
    fails: Fails = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    losses: list[Any] = field(default_factory=list)
    leaked: int = 0

    def run(self) -> Training:
        retry = StepRetry(self.model)
        optimizer = torch.optim.AdamW(trained(self.model), lr=1e-2)
        random.seed(3)
        torch.manual_seed(3)
        given = batches(self.model)
        with Exhausted() as memory:
            for number, one in enumerate(given):
                self.losses.append(retry(self._step(memory, number, one)))
                assert memory.at == 0, "it did not fail"
                if (number + 1) % self.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        first = LEVELS.index(retry.switches[0]) if retry.switches else 0  # BERT has nothing selective
        assert retry.switches == LEVELS[first:][: len(self.fails)] and first < 2
        return self

    def _step(self, memory: Exhausted, number: int, one: dict[str, Tensor]) -> Callable[[], Any]:
        attempts = iter(range(9))

        def step() -> Any:
            self.leaked += memory.alive()
            part = self.fails.get((number, next(attempts)))
            if part is not None:
                level = level_text(current_policy(self.model))
                memory.fail_after(1 + int(part * self.operations[level]))
            loss = self.model(**one).loss / self.accumulate
            loss.backward()
            return loss.item(), random.random()

        return step

    def equals(self, other: Training) -> bool:
        pairs = zip(trained(self.model), trained(other.model), strict=True)
        return self.losses == other.losses and all(torch.equal(mine, theirs) for mine, theirs in pairs)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    given = batch(model)
    return [{name: value.roll(i, -1) for name, value in given.items()} for i in range(MICRO_STEPS)]


def operations(model: nn.Module) -> dict[str, int]:
    """Of a step, by what layers do."""
    found, given = {}, batch(model)
    for level in ("keep", *LEVELS):
        fastpeft.accelerate(model, memory=LayerPolicy(level))  # type: ignore[arg-type]
        for _ in range(2):  # the first one runs more, to find siblings
            with Exhausted() as memory:
                model(**given).loss.backward()
            found[level] = memory.done
    return found


def copies(name: str = "llama") -> Iterator[nn.Module]:
    model = make(name, lora_dropout=0.3).train()
    while True:
        yield fastpeft.accelerate(copy.deepcopy(model))


THRICE: Fails = {(2, 0): 0.9, (2, 1): 0.9, (2, 2): 0.9}
PLACES: list[tuple[int, Fails]] = [
    (1, THRICE),
    (1, {(1, 0): 0.1}),
    (4, {(1, 0): 0.6}),
    (4, {(3, 0): 0.97}),
    (2, {(0, 0): 0.2, (0, 1): 0.3, (1, 0): 0.6}),
    (4, THRICE),
]


@pytest.mark.parametrize(
    ("accumulate", "fails"),
    [
        pytest.param(4, {(0, 0): 0.2, (1, 0): 0.6, (3, 0): 0.97}, id="first forward, backward, recomputation"),
        *(pytest.param(*place, marks=pytest.mark.full) for place in PLACES),
    ],
)
def test_the_same_bits(accumulate: int, fails: Fails) -> None:
    fresh = copies()
    wanted = Training(next(fresh), accumulate).run()
    found = Training(next(fresh), accumulate, fails, operations(next(fresh))).run()
    assert found.equals(wanted) and found.leaked == 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
def test_the_same_bits_wherever_it_fails(name: str) -> None:
    fresh = copies(name)
    wanted = Training(next(fresh)).run()
    counted = operations(next(fresh))
    levels = 2 if name in ("bert", "gpt2") else 3
    for part in (i / 16 for i in range(16)):
        fails = dict(list({(0, 0): part, (1, 0): part, (2, 0): 0.95 - part}.items())[:levels])
        found = Training(next(fresh), 4, fails, counted).run()
        assert found.equals(wanted) and found.leaked == 0, part


def failing(model: nn.Module, times: int = 9) -> Callable[[], object]:
    """Forward and backward of a batch, whose first so many attempts fail when gradients are there."""
    left, given = iter(range(times)), batch(model)

    def step() -> object:
        model(**given).loss.backward()
        if next(left, None) is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return "done"

    return step


def test_when_no_policy_is_left_the_advice_comes_once() -> None:
    model = fastpeft.accelerate(make(), memory=LayerPolicy("recompute"))
    before = [parameter.clone() for parameter in trained(model)]
    retry = StepRetry(model)
    with pytest.raises(OutOfMemory) as caught, fastpeft.explain_out_of_memory(model):
        retry(failing(model))
    said = str(caught.value)
    assert retry.switches == ["offload"] and said.count("fastpeft: memory ran out in") == 1
    assert said.endswith(
        "not run again: no policy is left that keeps less\nrun again before with activations of layers: offload"
    )
    assert type(caught.value.__cause__) is torch.OutOfMemoryError
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(trained(model), before, strict=True))


def test_each_layer_goes_on_from_its_own_policy() -> None:
    mixed = MemoryPolicy((LayerPolicy("offload"), LayerPolicy("keep", streamed=True)), decoded=1 << 20, ring=3)
    model = fastpeft.accelerate(make(), memory=mixed)
    retry, seen = StepRetry(model), []
    assert retry(failing(model, 3), undo=lambda: seen.append(current_policy(model))) == "done"
    assert retry.switches == ["selective, offload", "recompute, offload", "offload"]
    expected = MemoryPolicy((LayerPolicy("offload"), LayerPolicy("offload", streamed=True)), decoded=1 << 20, ring=3)
    assert seen[0] == mixed and current_policy(model) == expected
    rows = [row.op for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert rows == ["offload", "offload, streamed"]


def test_checkpointing_of_others_counts_as_recomputing() -> None:
    model = checkpointed(make(), False)
    retry = StepRetry(model)
    retry(failing(model, 1))
    assert retry.switches == ["offload"]
    fastpeft.restore(model)
    assert all(layer.gradient_checkpointing for layer in model_layers(model).values())
    assert not [note for note in fastpeft.report(model).notes if "memory" in note]


def test_gate_and_up_are_kept_again_where_the_layer_is_computed_again() -> None:
    model = fastpeft.accelerate(make())
    StepRetry(model)(failing(model, 2))
    mlps = [row.op for row in fastpeft.report(model).rows if row.kind == "mlp"]
    assert mlps == ["lora_mlp", "lora_mlp"]


def test_buffers_and_the_callers_own_state_are_put_back() -> None:
    model, counted = fastpeft.accelerate(make()), []
    steps = counting(model, 2)
    StepRetry(model)(failing(model, 2), undo=lambda: counted.append(1))
    assert steps.tolist() == [1, 1] and len(counted) == 2


class Average(nn.Module):
    """Replaces a buffer and writes into others at each call, and notes in an attribute what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(2))
        self.norm, self.calls = nn.BatchNorm1d(2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)  # torch counts no write to its buffers
        self.mean, self.calls = (self.mean * self.calls + x.mean(0)) / (self.calls + 1), self.calls + 1
        return self.mean


def test_buffers_that_are_replaced_and_what_attributes_say_of_them_are_put_back() -> None:
    model, other = fastpeft.accelerate(make()), Average()
    model.average = Average()
    x = torch.randn(5, 2)
    model.register_forward_pre_hook(lambda *_: [model.average(x)].clear())
    with Exhausted():
        StepRetry(model)(failing(model, 2))
    other(x)
    assert model.average.calls == 1 and fastpeft.report(model).rows
    for found, right in zip(model.average.buffers(), other.buffers(), strict=True):
        assert torch.equal(found, right)


def counting(model: nn.Module, size: int) -> Tensor:
    """A buffer that counts the model's calls."""
    buffer = torch.zeros(size)
    model.register_buffer("counter", buffer)
    model.register_forward_pre_hook(lambda *_: [buffer.add_(1)].clear())
    return buffer


def large(model: nn.Module) -> None:
    counting(model, 1 << 15)


def hooked(model: nn.Module) -> None:
    trained(model)[0].register_post_accumulate_grad_hook(lambda _: None)


def compiled(model: nn.Module) -> None:
    layer = next(iter(model_layers(model).values()))
    layer._compiled_call_impl = layer._call_impl  # as `layer.compile()` leaves it, but for the code


def written(model: nn.Module) -> None:
    def write(*_: Any) -> None:
        with torch.no_grad():
            trained(model)[0].add_(0)

    model.register_forward_pre_hook(write)


def among_others(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (large, "a large buffer of the model was written to in the step"),
        (hooked, "hooks on parameters' gradients run in backward, and what they had changed is not known"),
        (compiled, "the model is compiled, and other code may round otherwise"),
        (written, "trained parameters were changed in the step"),
        (among_others, "2 processes train together, and the others are past this step"),
    ],
)
def test_what_cannot_be_run_again_as_it_was_is_not(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft.memory.exhaustion.advice.prediction", lambda *_: ([], []))
    model = make()
    change(model, monkeypatch) if change is among_others else change(model)
    retry = StepRetry(model)
    with pytest.raises(OutOfMemory, match=f"not run again: {reason}"):
        retry(failing(model))
    assert retry.switches == []


def test_other_errors_pass() -> None:
    model = fastpeft.accelerate(make())
    retry = StepRetry(model)
    with pytest.raises(RuntimeError, match="of another kind"):
        retry(lambda: (_ for _ in ()).throw(RuntimeError("of another kind")))
    assert retry.switches == []
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        StepRetry("model")  # type: ignore[arg-type]
