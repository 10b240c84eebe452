"""Siblings of models, and of layers in none, within a module that calls some of them now and others later."""

from __future__ import annotations

import copy
import pickle
import random
from functools import partial
from threading import Event, Thread, current_thread

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from tests.integration.blocks import Block, Stack, assert_same, blocks, gradients, inputs
from tests.integration.models import make, make_base, with_lora
from tests.integration.reports import adapter_rows

OF_LLAMA, OF_BERT, OF_STACK = 10, 6, 6
"""Layers that have siblings in a tiny model of each."""


class Holder(nn.Module):
    """Calls the parts of this step; each run of a forward is noted."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.step: list[str] = list(parts)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        called = [self.parts[name] for name in self.step]
        return torch.stack([_sum(part, x) for part in called]).sum()


def _sum(part: nn.Module, x: Tensor) -> Tensor:
    if isinstance(part, Holder) or not any(hasattr(each, "config") for each in part.modules()):
        return part(x).float().square().mean()
    ids = torch.arange(12).view(2, 6) + 3
    return part(input_ids=ids).logits.float().square().mean()


def adapted_stack() -> nn.Module:
    """LoRA layers in no model of transformers or PEFT."""
    return with_lora(Stack(), None, target_modules=["q", "k", "v"]).base_model.model


def grouped(model: nn.Module, under: str = "") -> int:
    return len([row for row in adapter_rows(model) if row.partners and f".{row.path}".find(f".{under}") >= 0])


def stepped(ours: Holder, plain: Holder, *names: str) -> None:
    """One step with gradients that calls these parts, as PEFT's."""
    found, x = [], inputs()
    for holder in (ours, plain):
        holder.step, before = list(names), holder.runs
        found.append(gradients(holder, x))
        assert holder.runs == before + 1
    assert_same(*found)


def both(holder: Holder) -> tuple[Holder, Holder]:
    return fastpeft.accelerate(copy.deepcopy(holder)), holder


class TestCalledInTurn:
    def test_models_in_alternate_steps(self) -> None:
        ours, plain = both(Holder(a=make(), b=make("bert")).train())
        stepped(ours, plain, "a")
        assert grouped(ours) == OF_LLAMA
        for name in "bab":
            stepped(ours, plain, name)
        assert grouped(ours) == OF_LLAMA + OF_BERT

    def test_a_policy_and_its_reference(self) -> None:
        policy = make()
        ours, plain = both(Holder(policy=policy, reference=copy.deepcopy(policy)).train())
        for _ in range(2):
            stepped(ours, plain, "policy", "reference")
        assert grouped(ours) == 2 * OF_LLAMA

    def test_an_encoder_in_evaluation_only(self) -> None:
        ours, plain = both(Holder(trained=make(), encoder=make("bert")).train())
        stepped(ours, plain, "trained")
        ours.eval().step = ["encoder"]
        with torch.no_grad():
            ours(inputs())
        assert grouped(ours) == OF_LLAMA + OF_BERT

    def test_layers_in_no_model_are_reached_later(self) -> None:
        ours, plain = both(Holder(model=make(), head=adapted_stack(), tail=adapted_stack()).train())
        stepped(ours, plain, "model")
        assert grouped(ours) == OF_LLAMA
        assert "not had yet by parts.head.blocks.0.q and 11 more" in str(fastpeft.report(ours))
        stepped(ours, plain, "model", "head")
        assert grouped(ours) == OF_LLAMA + OF_STACK
        stepped(ours, plain, "tail")
        assert grouped(ours) == OF_LLAMA + 2 * OF_STACK
        assert "not had yet" not in str(fastpeft.report(ours))

    def test_a_module_in_no_model_runs_twice_and_once_for_what_comes_later(self) -> None:
        ours, plain = both(Holder(now=adapted_stack(), later=adapted_stack()).train())
        found, x = [], inputs()
        for holder in (ours, plain):
            holder.step = ["now"]
            found.append(gradients(holder, x))
        assert_same(*found)
        assert (ours.runs, grouped(ours)) == (2, OF_STACK)
        stepped(ours, plain, "later")
        assert grouped(ours) == 2 * OF_STACK

    def test_layers_beside_a_model_in_one_module_are_told_of(self) -> None:
        class Beside(Block):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.runs = make(), 0

            def forward(self, x: Tensor) -> Tensor:
                self.runs += 1
                return super().forward(x) + _sum(self.model, x)

        beside = Beside()
        for name in "qkv":
            adapted = with_lora(nn.Sequential(getattr(beside, name)), None, target_modules=["0"])
            setattr(beside, name, adapted.base_model.model[0])
        fastpeft.accelerate(beside)(inputs()).sum().backward()
        assert beside.runs == 1 and grouped(beside) == OF_LLAMA
        told = {row.note for row in adapter_rows(beside) if row.path in "qkv"}
        assert told == {"siblings not found: Beside has it beside a model, and is not run twice"}


def test_peft_around_a_module_around() -> None:
    """That module's forward runs once."""
    peft = get_peft_model(Holder(model=make_base("bert")), LoraConfig(target_modules=["query", "key", "value"]))
    ours = fastpeft.accelerate(peft)
    ours(inputs()).backward()
    assert ours.get_base_model().runs == 1
    assert grouped(ours) == OF_BERT


def test_another_thread_in_the_middle_of_a_block() -> None:
    """What it has called so far says nothing about siblings, and what it reached has had no chance."""
    ours, inside, going_on = fastpeft.accelerate(adapted_stack()), Event(), Event()
    first, second = blocks(ours)
    x, threads = inputs(), [current_thread()]

    def begins(_: Tensor) -> None:
        if len(threads) == 1:
            threads.append(Thread(target=lambda: ours(x)))
            threads[1].start()
            inside.wait(10)

    def waits(_: Tensor) -> None:
        if current_thread() is not threads[0]:
            inside.set()
            going_on.wait(10)

    first.between, second.between = begins, waits
    ours(x)
    going_on.set()
    threads[1].join()
    assert grouped(ours) == OF_STACK


def test_copies_and_pickles_before_the_first_call() -> None:
    ours, plain = both(Holder(a=make("bert"), b=Holder(c=make("bert"))).train())
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        stepped(copied, plain, "a")
        stepped(copied, plain, "b")
        assert grouped(copied) == 2 * OF_BERT
    assert not grouped(ours)


@pytest.mark.parametrize("seed", range(4))
def test_modules_in_modules_called_at_random(seed: int) -> None:
    """In the end everything was reached, and nothing is lost."""
    draw = random.Random(seed)

    def adapted_by_peft() -> nn.Module:
        return with_lora(Stack(), None, target_modules=["q", "k", "v"])

    def leaf() -> nn.Module:
        return draw.choice([adapted_stack, adapted_by_peft, lambda: make("bert")])()

    def tree(depth: int) -> Holder:
        parts = [tree(depth - 1) if depth and draw.random() < 0.6 else leaf() for _ in range(2)]
        return Holder(**{f"part{i}": part for i, part in enumerate(parts)})

    ours, plain = both(tree(2).train())
    leaves = [part for holder in holders(plain) for part in holder.parts.values() if not isinstance(part, Holder)]
    for _ in range(4):
        for mine, theirs in zip(holders(ours), holders(plain), strict=True):
            mine.step = theirs.step = draw.sample(["part0", "part1"], draw.choice([1, 2]))
        x, how = inputs().requires_grad_(), draw.choice(["plain", "copied", "reentrant", "checkpointed", "inference"])
        if how == "inference":
            with torch.inference_mode():
                torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-3)
            continue
        if how == "copied":
            ours = copy.deepcopy(ours)
        wrapped = (
            partial(checkpoint, use_reentrant=how == "reentrant") if how in ("reentrant", "checkpointed") else None
        )
        found = [gradients(m, x, None if wrapped is None else partial(wrapped, m)) for m in (ours, plain)]
        assert_same(*found)
    for holder in holders(ours):
        holder.step = list(holder.parts)
    ours(inputs()).backward()
    assert grouped(ours) == OF_BERT * len(leaves)  # a stack has as many


def holders(model: nn.Module) -> list[Holder]:
    return [module for module in model.modules() if isinstance(module, Holder)]
