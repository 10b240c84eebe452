"""The trials of a comparison, one after the other; what ended is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.training.arguments import check as check_arguments
from fastpeft.training.preparing import Prepared, prepare

from . import folder as results_folder
from . import trial as trials
from .measures import Measure, check_task, measure_of
from .plan import Options, Trial, chosen_rates, options_of, plan_of, searches, tests
from .splits import Splits, split


@dataclass(frozen=True)
class Comparison:
    """What has been found out so far.

    Attributes:
        options, config: as resolved.
        splits: of the rows.
        measure: what is measured of their task.
        results: of the trials that ended; see trial.Result.
        missing: how many trials there was no time for; searches that are not done hide those that follow them.
    """

    options: Options
    config: FastpeftConfig
    splits: Splits
    measure: Measure
    results: list[dict[str, Any]]
    missing: int


def compare(config: FastpeftConfig, console: Console, *, resume: bool = False, overwrite: bool = False) -> Comparison:
    """Search a learning rate for each method, then train and test each with several seeds.

    Args:
        config: model, data and training as of any run; `strategy.options` as plan.Options.
        console: for progress.
        resume: leave out the trials that ended in the output folder.
        overwrite: replace the comparison there.

    Raises:
        UserError: something in the configuration cannot be; nothing was written.
        MissingExtraError: a package is missing.
    """
    check_arguments(config)
    options = options_of(config)
    target = Path(config.training.output_dir).expanduser()
    results_folder.check(target, resume=resume, overwrite=overwrite)
    if (processes := PartialState().num_processes) > 1:
        raise UserError(f"compare: expected one process, got {processes}")
    if given := [name for name in ("eval_path", "eval_split", "eval_fraction") if getattr(config.data, name)]:
        raise UserError(f"data.{given[0]}: expected none, because a comparison divides the rows itself")
    start = time.perf_counter()
    prepared = prepare(config, console)
    task = prepared.config.model.task
    check_task(task)
    sizes = (options.rows, options.validation_rows, options.test_rows)
    splits = split(prepared.rows, sizes, options.similarity, config.training.seed, task)
    measure = measure_of(prepared, splits, options.generate)
    console.print(f"data: {_row_counts(splits)}", highlight=False, soft_wrap=True)
    plan = plan_of(prepared.config, options, splits.fingerprints())
    done = results_folder.begin(target, plan, overwrite=overwrite)
    deadline = None if options.minutes is None else start + 60 * options.minutes
    runner = _Runner(prepared, splits, measure, options, target, done, deadline, console)
    left = runner.run(searches(options, config.training.seed))
    chosen = chosen_rates(options, done, config.training.seed)
    left += runner.run(tests(options, chosen, config.training.seed))
    return Comparison(options, prepared.config, splits, measure, done, left)


def _row_counts(splits: Splits) -> str:
    parts = (
        f"{len(splits.train)} rows to learn from, {len(splits.validation)} of validation, {len(splits.test)} of test"
    )
    return f"{parts}; {splits.exact} repeated and {splits.near} nearly repeated ones left out"


class _Runner:
    def __init__(
        self,
        prepared: Prepared,
        splits: Splits,
        measure: Measure,
        options: Options,
        target: Path,
        done: list[dict[str, Any]],
        deadline: float | None,
        console: Console,
    ) -> None:
        self._prepared, self._splits, self._measure = prepared, splits, measure
        self._options, self._target = options, target
        self._done, self._deadline, self._console = done, deadline, console

    def run(self, wanted: list[Trial]) -> int:
        """Run what has no result yet, and append to `done`; returns for how many there was no time."""
        keys = {result["key"] for result in self._done}
        waiting = [trial for trial in wanted if trial.key not in keys]
        left = 0
        for number, trial in enumerate(waiting, 1):
            if not self._fits(trial):
                left += 1
                continue
            keep = self._target / results_folder.TRAINED / f"{trial.method}-{trial.seed}"
            kept = keep if self._options.save and trial.phase == "test" else None
            result = trials.run(trial, self._prepared, self._splits, self._measure, kept)
            results_folder.append(self._target, result)
            self._done.append(result)
            said = result["failed"] or self._result_text(result)
            self._console.print(f"{number}/{len(waiting)} {trial.key}: {said}", highlight=False, markup=False)
        return left

    def _result_text(self, result: dict[str, Any]) -> str:
        name = self._measure.chief.name
        return f"{name} {result['figures'][name]:.3f}, {result['seconds']:.0f} s"

    def _fits(self, trial: Trial) -> bool:
        """Whether it should end in time, by the longest of its method so far, else of all; the very first does."""
        if self._deadline is None:
            return True
        took = [result["seconds"] for result in self._done if result["method"] == trial.method]
        took = took or [result["seconds"] for result in self._done]
        return time.perf_counter() + max(took, default=0.0) <= self._deadline
