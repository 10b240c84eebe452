"""A copy of a part of a model takes that part along and nothing else, before siblings are found and after."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any
from weakref import ref

import pytest
from torch import Tensor, nn

import fastpeft
from tests.integration.blocks import Stack, blocks, check, pair
from tests.integration.reports import siblings

GROUPED = {frozenset("qkv")}


@pytest.mark.parametrize("grouped", [False, True], ids=["watching", "grouped"])
class TestCopiesOfAPart:
    @pytest.mark.parametrize("part", ["layer", "block", "stack"])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_take_along_nothing_else(self, grouped: bool, part: str, how: str) -> None:
        ours, peft = pair()
        if grouped:
            check(ours, peft)
        for block in blocks(ours):
            block.between = nothing  # can be pickled
        taken, plain = part_of(ours, part), part_of(peft, part)
        copied, modules = copy_of(taken, how)
        assert modules <= set(map(id, taken.modules()))
        everything = [ref(m) for m in ours.modules()]
        del ours, taken, block
        gc.collect()
        assert not any(module() for module in everything)
        check(copied, plain)
        if part != "layer":
            assert siblings(copied) == GROUPED
        fastpeft.restore(copied)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in copied.modules())
        assert not any(name.startswith("fastpeft") for m in copied.modules() for name in m.__dict__)

    def test_a_lone_layer_restored_before_its_first_call(self, grouped: bool) -> None:
        ours, peft = pair()
        if grouped:
            check(ours, peft)
        for action in (fastpeft.report, fastpeft.accelerate, fastpeft.restore):
            copied = copy.deepcopy(blocks(ours)[0].k)
            action(copied)
        assert not any(name.startswith("fastpeft") for m in copied.modules() for name in m.__dict__)

    def test_a_part_does_not_keep_the_rest(self, grouped: bool) -> None:
        ours, peft = pair()
        if grouped:
            check(ours, peft)
        block, rest = blocks(ours)[1], ref(ours)
        del ours
        gc.collect()
        assert rest() is None
        check(block, blocks(peft)[1])
        assert siblings(block) == GROUPED


def nothing(_: Tensor) -> None:
    """Between the projections."""


def part_of(model: Any, part: str) -> nn.Module:
    stack = next(m for m in model.modules() if isinstance(m, Stack))
    return {"layer": blocks(model)[1].k, "block": blocks(model)[1], "stack": stack}[part]


def copy_of(part: nn.Module, how: str) -> tuple[nn.Module, set[int]]:
    """A copy, and the ids of the modules that went into it."""
    if how == "deepcopy":
        memo: dict[int, Any] = {}
        copied = copy.deepcopy(part, memo)
        return copied, {key for key, value in memo.items() if isinstance(value, nn.Module)}
    modules: set[int] = set()

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            if isinstance(thing, nn.Module):
                modules.add(id(thing))
            return NotImplemented

    file = io.BytesIO()
    Pickler(file).dump(part)
    return pickle.loads(file.getvalue()), modules


def test_a_copy_of_all_is_watched_on_its_own() -> None:
    ours, peft = pair()
    for block in blocks(ours):
        block.between = nothing
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    check(ours, peft)
    copies += [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    assert [bool(siblings(copied)) for copied in copies] == [False, False, True, True]
    everything = [ref(m) for m in ours.modules()]
    del ours, block
    gc.collect()
    assert not any(module() for module in everything)
    for copied in copies:
        check(copied, peft)
        assert siblings(copied) == GROUPED
