"""A resumed run computes as it did before: with the choices and groups that its checkpoint has, not with new ones."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastpeft
from fastpeft.errors import UserError
from fastpeft.layers.grouping import Grouping, group_again, grouping_of
from fastpeft.training.checkpoints import seal
from fastpeft.training.choices import file_of, settled
from fastpeft_kernels.attention.keys import OP
from fastpeft_kernels.tuning import choosing, files
from fastpeft_kernels.tuning.records import Winner
from tests.checkpoints import Checkpoints, write_rows
from tests.integration.blocks import Block, blocks, inputs, many, pair
from tests.integration.reports import siblings
from tests.processes import together

from .runs import Run, adapter, chats, interrupted, train

CPU = torch.device("cpu")
STEPS = shlex.split("--learning-rate 1e-2 --logging-steps 1 --report-to none --batch-size 1 --max-steps 4")


def measure(cases: list[Any], choice: str) -> None:
    """As `fastpeft tune` in another process: the file has these winners."""
    name = choosing.device_name(CPU)
    path = files.file_of(name, files.user_folder())
    path.unlink(missing_ok=True)
    rows = [{key: list(v) if isinstance(v, tuple) else v for key, v in case._asdict().items()} for case in cases]
    files.add(path, name, [Winner(OP, row, choice, {}) for row in rows])
    choosing.forget()


def same(first: Run, second: Run) -> bool:
    ours, theirs = adapter(first.folder), adapter(second.folder)
    return first.losses == second.losses and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.full)])
def test_choices_that_are_measured_anew_between_the_halves(
    kept: bool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *chats())
    arguments = ["--model", checkpoints["llama"], "--data", rows, *STEPS]
    with choosing.meeting() as met, choosing.forced({OP: "blockwise"}):
        whole = train(tmp_path / "whole", *arguments)
    cases = [case for op, case in met if op == OP]
    assert cases, "rows alone have no padding, so there is a choice"
    measure(cases, "blockwise")
    interrupted(tmp_path / "run", *arguments, at=2)
    measure(cases, "sdpa")
    if not kept:  # as an earlier version saved it
        checkpoint = tmp_path / "run" / "checkpoint-2"
        file_of(checkpoint, 0).unlink()
        seal(checkpoint)
    assert same(train(tmp_path / "run", "--resume"), whole) is kept
    assert {winner for _, _, winner in choosing.measured(CPU)} == {"sdpa"}, "the run's own, for as long as it took"


def began(with_all: bool) -> Any:
    """Accelerated, its siblings found in a first forward that called all projections, or q alone of the first block."""
    model, _ = pair()
    first = blocks(model)[0]
    first.skip = not with_all
    model(inputs())
    first.skip = False
    return model


@pytest.mark.parametrize("with_all", [True, False])
def test_groups_are_those_of_the_first_half_whatever_the_second_begins_with(with_all: bool) -> None:
    found = grouping_of(began(with_all))
    assert [len(found.groups), len(found.alone)] == ([2, 0] if with_all else [1, 3])
    resumed, _ = pair()
    group_again(resumed, Grouping(**json.loads(json.dumps(vars(found)))))
    calls: list[int] = []
    resumed.get_base_model().embed.register_forward_hook(lambda *_: calls.append(1))
    resumed(many())
    assert len(calls) == 1, "nothing is watched"
    assert grouping_of(resumed) == found != grouping_of(began(not with_all))
    fastpeft.restore(resumed)
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks(resumed))


def test_frozen_siblings_and_layers_that_were_not_called_yet() -> None:
    model, _ = pair(target_modules=["q", "v"])
    assert grouping_of(model) == Grouping([], [])
    model(inputs().requires_grad_())
    found = grouping_of(model)
    assert [[path.rpartition(".")[2] for path in group] for group in found.groups] == [["q", "k", "v"]] * 2
    resumed, _ = pair(target_modules=["q", "v"])
    group_again(resumed, found)
    assert siblings(resumed) == siblings(model) != set() and grouping_of(resumed) == found


@pytest.mark.parametrize(
    "groups",
    [
        [["base_model.model.blocks.0.q", "base_model.model.blocks.1.q"]],
        [["base_model.model.blocks.0.q"]],
        [["base_model.model.blocks.0.q"] * 2],
        [["base_model.model.blocks.0.q", "base_model.model.blocks.0.gone"]],
        [["base_model.model.blocks.0.q", "base_model.model.blocks.0.v.lora_A"]],
        [["", ""], []],
    ],
)
def test_a_group_that_cannot_be_is_left_to_watching(groups: list[list[str]]) -> None:
    model, _ = pair()
    group_again(model, Grouping(groups, ["base_model", "gone"]))
    model(inputs())
    assert siblings(model) == {frozenset("qkv")}


def arguments(folder: Path, process: int = 0, processes: int = 1) -> Any:
    return SimpleNamespace(device=CPU, process_index=process, world_size=processes, output_dir=str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "[" * 100_000, '{"device": 1, "measured": [], "grouping": {"groups": [], "alone": []}}',
        *(
            f'{{"device": "x", "measured": [{row}], "grouping": {{"groups": [], "alone": []}}}}'
            for row in ("[]", '["op", "case", "x"]', '["op", [{}], "x"]', '["op", [[[1]]], "x"]')
        ),
        '{"device": "x", "measured": [], "grouping": {"groups": [[1]], "alone": []}}',
    ],
)  # fmt: skip
def test_another_file_in_its_place(text: str, tmp_path: Path) -> None:
    file_of(tmp_path, 0).write_text(text)
    with (
        pytest.raises(UserError, match=r"choices_0.json: expected the choices of a run, got another file"),
        settled(Block(), arguments(tmp_path), tmp_path),
    ):
        pass


def test_several_processes_take_the_first_one_s(tmp_path: Path) -> None:
    def winners(rank: int) -> Any:
        with choosing.measured_as(CPU, [("op", (rank, (1, 2)), "quick")]):
            with settled(Block(), arguments(tmp_path, rank, 2), None):
                found = choosing.measured(CPU)
            return found, choosing.measured(CPU)

    first, second = together(2, winners, tmp_path)
    assert first == ([("op", (0, (1, 2)), "quick")],) * 2
    assert second == ([("op", (0, (1, 2)), "quick")], [("op", (1, (1, 2)), "quick")])
