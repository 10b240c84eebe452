"""`fastpeft compare`: the protocol, resuming, budgets, failures, and what is written."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpeft.cli import app
from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.strategies.compare import runner, trial
from fastpeft.strategies.compare.plan import Trial
from fastpeft.strategies.compare.report import report
from fastpeft.strategies.compare.summary import summarise
from fastpeft.training.preparing import Prepared, prepare

from .compared import QUIET, Configure, out

pytestmark = pytest.mark.usefixtures("uncollected")


@pytest.fixture(scope="module")
def read_once() -> dict[str, Prepared]:
    return {}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, read_once: dict[str, Prepared]) -> list[str]:
    """Keys of the trials that were run; their figures follow from the keys, and no model is trained."""
    ran: list[str] = []

    def prepared(config: FastpeftConfig, console: Console) -> Prepared:
        if config.data.path not in read_once:
            read_once[config.data.path] = prepare(config, console)
        found = read_once[config.data.path]
        return replace(found, config=replace(config, model=found.config.model, data=found.config.data))

    def run(one: Trial, prepared: Any, splits: Any, measure: Any, keep: Path | None = None) -> dict[str, Any]:
        ran.append(one.key)
        true = list((splits.validation if one.phase == "search" else splits.test).rows["labels"])
        drawn = random.Random(one.key)
        guesses = [label if drawn.random() < 0.8 else 1 - label for label in true]
        columns: Any = {"true": true, "guessed": guesses}
        figures = measure.values(columns)
        right = figures["accuracy"]
        result = trial.Result(one.key, **vars(one), figures=figures, score=right, loss=1 - right, columns=columns)
        return vars(result) | {"trainable": 10 * len(one.method), "parameters": 1000, "seconds": 60.0}

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(runner, "prepare", prepared)
    return ran


def test_the_command_writes_table_figure_and_json(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure()
    path = out(config).with_name("compare.yaml")
    path.write_text(config.to_yaml())
    assert (
        app.run(["compare", str(path), "--methods", "head,prompt", "--seeds", "1", "--rates", "1", "--json", "--quiet"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out(config) / "results.json").read_text())
    head, prompt = printed["methods"]
    assert (
        head["seeds"] == 1
        and 0 <= head["figures"]["accuracy"]["value"] <= 1
        and head["figures"]["accuracy"]["low"] is None
    )
    assert "no values for bert.pooler.dense" in prompt["failed"] and prompt["figures"] == {}
    assert printed["complete"] and printed["data"] | {"train": 40, "repeated": 8} == printed["data"]
    assert [one["phase"] for one in printed["trials"]] == ["search"] * 2 + ["test"]
    text = (out(config) / "report.md").read_text()
    assert "| prompt tuning |  | failed |" in text and "![accuracy over trained parameters](comparison.svg)" in text
    assert (out(config) / "comparison.svg").read_text().startswith("<?xml")


def test_the_rate_is_chosen_on_validation_and_each_test_is_run_once(configure: Configure, pretended: list[str]) -> None:
    found = runner.compare(configure(), QUIET)
    searched = {one["key"]: one for one in found.results if one["phase"] == "search"}
    assert len(searched) == 4 and {one["seed"] for one in searched.values()} == {0}
    tested = [one for one in found.results if one["phase"] == "test"]
    assert [(one["method"], one["seed"]) for one in tested] == [("full", 1), ("lora", 1), ("full", 2), ("lora", 2)]
    for one in tested:
        tried = [other for other in searched.values() if other["method"] == one["method"]]
        assert one["rate"] == max(tried, key=lambda other: other["score"])["rate"]
    assert len(set(pretended)) == len(pretended) == 8


def test_a_run_cut_short_goes_on_to_the_same_table(
    configure: Configure, pretended: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = runner.compare(configure(), QUIET)
    table = report(whole, summarise(whole))
    config = configure(f"training.output_dir={tmp_path / 'cut'}")
    run, before = trial.run, len(pretended)

    def killed(*given: Any) -> Any:
        if len(pretended) == before + 5:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(trial, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        runner.compare(config, QUIET)
    with open(out(config) / "trials.jsonl", "a") as file:
        file.write('{"key": "search fu')  # a line that the kill cut short
    with pytest.raises(UserError, match="holds a comparison already: --resume goes on with it"):
        runner.compare(config, QUIET)
    monkeypatch.setattr(trial, "run", run)
    resumed = runner.compare(config, QUIET, resume=True)
    assert pretended[before:] == pretended[:before], "the same trials in the same order, none twice"
    assert report(resumed, summarise(resumed)) == table
    assert runner.compare(config, QUIET, resume=True).results == resumed.results


def test_a_resumed_run_may_have_more_seeds_and_methods_but_no_other_steps(
    configure: Configure, pretended: list[str]
) -> None:
    runner.compare(configure(seeds=1, methods=["full"]), QUIET)
    assert len(runner.compare(configure(), QUIET, resume=True).results) == 8
    with pytest.raises(UserError, match=r"training\.max_steps: expected 4, as the comparison to resume has it, got 5"):
        runner.compare(configure("training.max_steps=5"), QUIET, resume=True)
    with pytest.raises(UserError, match=r"strategy\.options\.rows: expected 40"):
        runner.compare(configure(rows=30), QUIET, resume=True)
    assert len(runner.compare(configure(rows=30), QUIET, overwrite=True).results) == 8


def test_no_trial_begins_that_would_end_beyond_the_budget(
    configure: Configure, pretended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, run = [0.0], trial.run
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now[0])

    def slow(*given: Any) -> Any:
        now[0] += 60.0
        return run(*given)

    monkeypatch.setattr(trial, "run", slow)
    found = runner.compare(configure(minutes=6.5), QUIET)
    assert len(found.results) == 6 and found.missing == 2
    rows = summarise(found)
    assert [row.seeds for row in rows] == [1, 1], "a seed of each method rather than two of one"
    assert math.isinf(rows[0].figures["accuracy"].high), "a single seed has no interval"
    assert "**Incomplete**: no time was left for at least 2 trials" in report(found, rows)
    early = runner.compare(configure(minutes=2.5), QUIET, overwrite=True)
    assert len(early.results) == 2 and [row.seeds for row in summarise(early)] == [0, 0]
    assert "not yet" in report(early, summarise(early))


def test_figures_over_seeds_and_over_rows(configure: Configure, pretended: list[str]) -> None:
    found = runner.compare(configure(), QUIET)
    full, lora = summarise(found)
    tests = {one["key"]: one for one in found.results if one["phase"] == "test"}
    of = {
        name: [one["figures"]["accuracy"] for one in tests.values() if one["method"] == name]
        for name in ("full", "lora")
    }
    mean = sum(of["lora"]) / 2
    accuracy = lora.figures["accuracy"]
    assert lora.rows is not None and lora.difference is not None
    assert accuracy.value == pytest.approx(mean) and lora.rows.value == pytest.approx(mean)
    half = 12.7062 * abs(of["lora"][0] - of["lora"][1]) / 2  # Student's with one degree of freedom
    assert accuracy.high - mean == pytest.approx(half, rel=1e-4)
    gaps = [one - other for one, other in zip(of["lora"], of["full"], strict=True)]
    assert lora.difference.value == pytest.approx(sum(gaps) / 2) and full.difference is None


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"methods": ["loar"]}, [], "got 'loar', did you mean 'lora'"),
        ({"methods": ["lora", "lora"]}, [], "expected each once, got lora, lora"),
        ({"seeds": 0}, [], r"strategy\.options\.seeds: expected at least 1, got 0"),
        ({"similarity": 0.0}, [], "expected above 0 and at most 1"),
        ({"minutes": 0.0}, [], "expected more than 0"),
        ({"generate": -1}, [], r"strategy\.options\.generate: expected at least 0, got -1"),
        ({}, ["data.packing=true"], r"data\.packing: expected false"),
        ({"ranges": {"lora": [1e-3, 1e-4]}}, [], "the lowest and the highest rate"),
        ({"sedes": 2}, [], r"did you mean 'strategy\.options\.seeds'"),
        ({}, ["training.max_steps=-1"], "as every method trains as long"),
        ({}, ["memory.streamed=true"], "expected no key but gradient_checkpointing"),
        ({}, ["method=qlora"], "qlora is one of the methods"),
        ({}, ["data.eval_fraction=0.1"], "a comparison divides the rows itself"),
        ({}, ["strategy.name=task2"], "expected 'compare'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    configure: Configure, options: dict[str, Any], settings: list[str], message: str
) -> None:
    config = configure(*settings, **options)
    with pytest.raises(UserError, match=message):
        runner.compare(config, QUIET)
    assert not out(config).exists()
