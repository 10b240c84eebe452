"""Dynamic runs: what rules do, what the report says of it, and that a run goes on as if it had not been broken off."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fastpeft.cli import app
from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.strategies.dynamic.actions import rules_of
from fastpeft.strategies.dynamic.rank import cut_to
from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.training.runs import Run, adapter, classes, completions, interrupted, texts, train

QUICK = shlex.split("--batch-size 4 --lora.r 4 --logging-steps 1 --report-to none --learning-rate 1e-2 --max-length 64")
ROWS = {"llama": texts, "bert": classes, "t5": completions}
"""A synthetic task for each kind of model: six sayings again and again, to be learned by heart."""
FREEZE = {"action": "freeze", "below": 0.99, "order": "any", "start": 2, "every": 1}
RANKS = {"action": "ranks", "budget": 40, "start": 2, "end": 6, "every": 2}
PACE = {"action": "pace", "until": 6, "every": 2, "window": 8}


def rules(*given: dict[str, Any], **options: Any) -> list[str]:
    return ["--strategy.name", "dynamic", "--strategy.options", json.dumps({"rules": list(given), **options})]


def arguments(folder: Path, model: str, checkpoints: Checkpoints, *more: str, steps: int = 10) -> list[str]:
    rows = write_rows(folder / "rows.jsonl", *ROWS[model](24))
    name = SHIPPED if model == "llama" else checkpoints[model]
    task = ["--data.eval-fraction", "0.25", "--max-steps", str(steps)]
    return ["--model", name, "--data", rows, *task, *QUICK, *more]


def decisions(found: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.folder / "decisions.jsonl").read_text().splitlines()]


def metrics(found: Run) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in found.record["findings"]["metrics"]}


def sections(found: Run) -> dict[str, str]:
    return {section["title"]: section["text"] for section in found.record["findings"]["sections"]}


def beside(found: Run) -> dict[str, list[str]]:
    """Cells of the table of both runs, dynamic and static."""
    lines = sections(found)["Beside the same steps without rules"].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def same(found: Run, wanted: Run) -> None:
    assert found.record["losses"] == wanted.record["losses"]
    assert found.record["evaluation"] == wanted.record["evaluation"]
    assert decisions(found) == decisions(wanted)
    ours, theirs = adapter(found.folder), adapter(wanted.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, checkpoints: Checkpoints) -> tuple[list[str], Run]:
    """A run under three rules, and its arguments."""
    folder = tmp_path_factory.mktemp("whole")
    more = ["--save-steps", "100", "--learning-rate", "2e-2"]
    given = [*arguments(folder, "llama", checkpoints, *more, steps=8), *rules(FREEZE, RANKS, PACE)]
    return given, train(folder / "run", *given)


def test_layers_freeze_and_ranks_go(whole: tuple[list[str], Run]) -> None:
    found = whole[1]
    assert found.losses[-1] < 0.7 * found.losses[0]
    assert metrics(found)["loss per token"]["high"] < metrics(found)["loss per token"]["baseline"]
    kinds = {decision["action"] for decision in decisions(found)}
    assert kinds == {"freeze", "ranks", "pace"} and (found.folder / "decisions.png").is_file()
    first = next(decision for decision in decisions(found) if decision["action"] == "freeze")
    assert first["step"] == 2 and set(first["value"]) == {"0", "1", "2", "3"}
    base = AutoModelForCausalLM.from_pretrained(SHIPPED)
    plain, ours = PeftModel.from_pretrained(base, str(found.folder)).eval(), found.model.eval()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, ours(ids).logits, atol=1e-4)
    ranks = [module.r["default"] for module in plain.modules() if hasattr(module, "lora_A")]
    assert sum(ranks) == 40 and min(ranks) >= 1 and len(ranks) == 28


def test_a_broken_run_ends_as_one_that_was_not(whole: tuple[list[str], Run], tmp_path: Path) -> None:
    given, wanted = whole
    interrupted(tmp_path / "broken", *given, at=5)
    same(train(tmp_path / "broken", "--resume"), wanted)


MORE = {
    "sampled": ("llama", [{"action": "sample", "layers": 2, "every": 2, "signal": "importance"}]),
    "scheduled": (
        "llama",
        [{"action": "schedule", "stages": [{"at": 0, "trained": [-1]}, {"at": 5, "trained": "all"}]}],
    ),
    "thawed": ("llama", [FREEZE | {"against": "own", "below": 2.0, "thaw_after": 3, "signal": "importance"}]),
    "weighted": ("llama", [{"action": "reweight", "anchor": 0.1, "start": 2}, PACE]),
    "dylora": ("llama", [{"action": "dylora"}]),
    "rate": ("llama", [{"action": "rate", "patience": 1, "improvement": 9.0}]),
    "stopped": ("llama", [{"action": "stop", "signal": "loss", "patience": 2, "improvement": 9.0, "every": 3}]),
    "classes": ("bert", [FREEZE | {"keep": 1}, {"action": "reweight"}]),
    "encoder-decoder": ("t5", [{"action": "sample", "layers": 2, "every": 3}, {"action": "reweight", "anchor": 0.1}]),
}


@pytest.mark.full
@pytest.mark.parametrize("case", MORE)
def test_every_rule_resumes_and_is_the_same_without_acceleration(
    case: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    model, given = MORE[case]
    slow = ["--learning-rate", "3e-3"]  # a high rate makes other runs of other roundings
    settings = [*arguments(tmp_path, model, checkpoints, "--eval-steps", "3", *slow), *rules(*given)]
    whole = train(tmp_path / "whole", *settings)
    assert decisions(whole)
    interrupted(tmp_path / "broken", *settings, at=5)
    same(train(tmp_path / "broken", "--resume"), whole)
    plain = train(tmp_path / "plain", *settings, "--acceleration.enabled", "false")
    assert plain.losses == pytest.approx(whole.losses, rel=2e-3, abs=1e-4)
    does = [[decision[name] for name in ("step", "action", "does")] for decision in decisions(whole)]
    assert does == [[decision[name] for name in ("step", "action", "does")] for decision in decisions(plain)]


@pytest.mark.full
def test_an_adapter_is_as_good_at_each_rank_as_the_report_says(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """Cut to a rank and loaded by plain PEFT."""
    given = [*arguments(tmp_path, "llama", checkpoints, steps=16), *rules({"action": "dylora"})]
    found = train(tmp_path / "run", *given)
    lines = sections(found)["By rank"].splitlines()[2:]
    losses = {int(cells[1]): float(cells[2]) for line in lines if (cells := line.split("|"))}
    assert list(losses) == [1, 2, 4]
    whole = metrics(found)["loss per token"]
    assert losses[4] == pytest.approx(whole["value"], abs=1e-4) and losses[1] < whole["baseline"]
    cut_to(found.model, 2)
    found.model.save_pretrained(str(tmp_path / "cut"))
    base = AutoModelForCausalLM.from_pretrained(SHIPPED)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "cut")).eval()
    assert {module.r["default"] for module in plain.modules() if hasattr(module, "lora_A")} == {2}
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, found.model.eval()(ids).logits, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("model", ROWS)
def test_every_kind_of_model_learns(model: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    given = {"action": "sample", "layers": 1, "every": 4}
    faster = ["--learning-rate", "3e-2" if model == "t5" else "1e-2", "--lora.r", "8"]
    found = train(
        tmp_path / "run", *arguments(tmp_path, model, checkpoints, *faster, steps=40), *rules(given, static=True)
    )
    table = beside(found)
    assert table["steps"] == ["40", "40"]
    for row in ("trained values, mean of the steps", "optimizer state, mean, MiB"):
        dynamic, static = (float(cell.replace(",", "")) for cell in table[row])
        assert dynamic < 0.8 * static, row
    assert "dynamic less static" in " ".join(metrics(found))
    assert found.losses[-1] < 0.7 * found.losses[0]
    name, better = ("accuracy", "low") if model == "bert" else ("loss per token", "high")
    figure = metrics(found)[name]
    assert figure[better] > figure["baseline"] if better == "low" else figure[better] < figure["baseline"]


@pytest.mark.full
def test_rules_that_never_act_change_nothing(tmp_path: Path, checkpoints: Checkpoints) -> None:
    given = arguments(tmp_path, "llama", checkpoints, "--lora.dropout", "0.2")
    found = train(tmp_path / "run", *given, *rules(FREEZE | {"start": 50}, static=True))
    plain = train(tmp_path / "plain", *given)
    assert found.losses == plain.losses and not decisions(found)
    ours, theirs = adapter(found.folder), adapter(plain.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(set(beside(found)["loss on the evaluation"])) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"action": "freez"}], "strategy.options.rules[0].action: expected one of freeze, schedule, sample"),
        ([{"action": "freeze", "signal": "gradnorm"}], "strategy.options.rules[0].signal: expected one of"),
        ([{"action": "freeze", "above": 1}], "strategy.options.rules[0].above: unknown key"),
        ([{"action": "freeze", "keep": 0}], "strategy.options.rules[0].keep: expected at least 1, got 0"),
        ([{"action": "pace", "share": 1.5}], "rules[0].share: expected more than 0 and less than 1, got 1.5"),
        ([FREEZE, {"action": "sample"}], "rules[1].action: expected one rule that chooses layers, got sample beside"),
        ([{"action": "dylora"}, RANKS], "strategy.options.rules[1].action: expected ranks or dylora, got both"),
        ([{"action": "dylora", "least": 0}], "strategy.options.rules[0].least: expected at least 1, got 0"),
        ([PACE, PACE], "strategy.options.rules[1].action: expected one rule of pace, got another"),
        ([{"action": "schedule"}], "strategy.options.rules[0].stages: expected at least one, with at from 0"),
    ],
)
def test_wrong_rules(given: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        rules_of(given, FastpeftConfig())


def test_no_rule_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", *arguments(tmp_path, "llama", checkpoints), *rules(), code=2)
    assert "strategy.options.rules: expected at least one rule, got none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_best_adapter_may_have_more_ranks_than_the_last(
    tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    best = ["--training.extra", '{"load_best_model_at_end": true}']
    train(tmp_path / "run", *arguments(tmp_path, "llama", checkpoints, *best), *rules(PACE, RANKS), code=2)
    said = "training.extra.load_best_model_at_end: expected false with strategy.options.rules[1], ranks, got true"
    assert said in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [{"action": "schedule", "stages": [{"at": 0, "trained": "all"}, {"at": 7, "trained": []}]}],
            "rules[0].stages[1].trained: expected at least one layer, got none: nothing would be trained at step 7",
        ),
        ([{"action": "schedule", "stages": [{"at": 0, "trained": [9]}]}], "expected layers of 0-3 with something to"),
        ([{"action": "ranks", "budget": 27}], "rules[0].budget: expected at least one for each of 28 adapters, got 27"),
        ([{"action": "ranks", "budget": 112}], "rules[0].budget: expected less than the 112 ranks there are, got 112"),
        ([{"action": "dylora", "least": 4}], "rules[0].least: expected less than the adapters' rank of 4, got 4"),
        ([{"action": "dylora", "measured": [1, 5]}], "rules[0].measured: expected ranks of 1 to 4, got 5"),
        ([{"action": "freeze", "keep": 4}], "rules[0].keep: expected less than the model's 4 trained layers, got 4"),
        ([{"action": "sample", "layers": 4}], "rules[0].layers: expected less than the model's 4 trained layers"),
    ],
)
def test_rules_that_do_not_fit_the_model(
    given: list[dict[str, Any]], said: str, tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", *arguments(tmp_path, "llama", checkpoints), *rules(*given), code=2)
    assert said in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.full
def test_other_rules_cannot_resume(
    tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, "llama", checkpoints)
    interrupted(tmp_path / "run", *given, *rules(PACE), at=3)
    changed = rules(PACE | {"until": 9})
    assert app.run(["train", "--quiet", "--output-dir", str(tmp_path / "run"), *given, *changed, "--resume"]) == 2
    assert "strategy.options" in capsys.readouterr().err
