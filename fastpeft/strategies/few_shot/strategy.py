"""Few-shot fine-tuning: K rows a class are drawn, trained on, and measured on rows that were never drawn."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from rich.console import Console
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from fastpeft.config import FastpeftConfig
from fastpeft.data.encoding import encode
from fastpeft.data.kinds import LABELLED
from fastpeft.data.labels import SINGLE, find_labels
from fastpeft.errors import UserError
from fastpeft.metrics.classification import accuracy, f1_macro
from fastpeft.metrics.findings import Findings
from fastpeft.models import bases
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.models.tasks import AUTO, fits
from fastpeft.strategies.base import Strategy
from fastpeft.strategies.figures import classes as figures
from fastpeft.training.evaluating import classes
from fastpeft.training.optimizers import chosen_optimizer, set_optimizer
from fastpeft.training.preparing import Prepared, Raw
from fastpeft.training.watching import StopAtNaN

from . import draws as kept
from .drawing import Pool, check_rows, class_of, distinct, held_back
from .draws import Draw
from .method import Classifier, Method, classes_of
from .methods import method_class
from .options import FewShotOptions


class FewShot(Strategy):
    """One draw is trained as any run; the others after it, each from the base anew."""

    name: ClassVar[str] = "few-shot"
    Options: ClassVar[type] = FewShotOptions
    read_as: ClassVar[str] = "sequence-classification"
    options: FewShotOptions

    def __init__(self, config: FastpeftConfig) -> None:
        super().__init__(config)
        self._method: Method = method_class(self.options.method)(self.options, config)
        self._baselines: dict[str, list[int]] = {}

    def check(self) -> None:
        self.options.check()
        if self.config.training.eval_steps is not None:
            raise UserError(
                "training.eval_steps: expected null for strategy few-shot, which measures once at the end, "
                f"got {self.config.training.eval_steps}"
            )
        self._method.check()

    def prepare(self, console: Console) -> Prepared:
        task = self._task()
        self.config = replace(self.config, model=replace(self.config.model, task=task))  # type: ignore[arg-type]
        prepared = super().prepare(console)
        if (problem := prepared.config.data.problem_type) != SINGLE:
            raise UserError(f"data.problem_type: expected {SINGLE} for strategy few-shot, got {problem}")
        self._method.config = prepared.config
        self._method.begin(prepared, self._pool)
        notes = [] if prepared.evaluation is not None else ["nothing is measured: give data.eval_fraction or eval_path"]
        return replace(prepared, notes=[*prepared.notes, *notes, *self._method.notes()])

    def edit(self, raw: Raw) -> Raw:
        options, seed = self.options, self.config.training.seed
        rows, evaluation = raw.rows, raw.evaluation
        classes = raw.data.labels or []
        if options.novel and set(classes) == set(options.novel):  # as the configuration that a run left has them
            classes = find_labels(rows, "label", several=False)
        check_rows(rows, classes, "data")
        labels = self._method.measured(classes)
        if raw.data.eval_fraction:
            count = max(1, round(len(rows) * raw.data.eval_fraction))
            rest, held = held_back(rows, count, seed, "data.eval_fraction")
            rows, evaluation = rows.select(rest), rows.select(held)
        elif evaluation is not None:
            check_rows(evaluation, classes, "data.eval_path" if raw.data.eval_path else "data.eval_split")
            evaluation = evaluation.select(distinct(evaluation))
        if evaluation is not None and options.novel:
            evaluation = evaluation.select([n for n, row in enumerate(evaluation) if class_of(row) in labels])
            if len(evaluation) == 0:
                raise UserError(
                    f"strategy.options.novel: expected rows of {', '.join(labels)} to measure on, got none; give more "
                    "data.eval_fraction, or other rows"
                )
        if evaluation is not None and len(evaluation) > options.measured_rows:
            _, held = held_back(evaluation, options.measured_rows, seed, "strategy.options.measured_rows")
            evaluation = evaluation.select(held)
        self._pool = Pool(rows, evaluation, options.near_threshold)
        self._fill = self._method.fill(raw)
        drawn = self._filled(rows.select(self._pool.draw(labels, options.shots, seed)))
        evaluation = None if evaluation is None else self._filled(evaluation)
        return replace(raw, rows=drawn, evaluation=evaluation, data=replace(raw.data, labels=labels))

    def settle(self, prepared: Prepared, arguments: Any, checkpoint: Path | None, console: Console) -> Any:
        self._console = console
        return _without_evaluation(arguments)

    def load(self, prepared: Prepared, device: Any, dtype: Any) -> Any:
        return self._method.load(prepared, device, dtype)

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        return self._method.trainer(prepared, model, arguments, callbacks)

    def before(self, prepared: Prepared, trainer: Any) -> None:
        self._baselines = self._without_training(prepared, trainer.model)

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        target, first = Path(trainer.args.output_dir), trainer.is_world_process_zero()
        classifier = self._method.fit(prepared, trainer.model)
        if classifier is not None and first:
            classifier.save(target, prepared.config.data.labels or [])
        if prepared.evaluation is None:
            return Findings()
        guessed = self._guesses(classifier, prepared, trainer)
        found = figures.findings(prepared, guessed, None)
        if self._baselines:
            true = prepared.evaluation.rows["labels"]
            best = max(self._baselines, key=lambda name: accuracy(true, self._baselines[name]))
            value = accuracy(true, self._baselines[best])
            head, *others = found.metrics
            found = replace(found, metrics=(replace(head, baseline=value, against=best), *others))
        draws = [self._figures(prepared, trainer, guessed, self._baselines)]
        if self.options.seeds > 1:
            steps = trainer.state.max_steps
            done = {draw.seed: draw for draw in kept.read(target) if draw.steps == steps and draw.like(draws[0])}
            for seed in range(draws[0].seed + 1, draws[0].seed + self.options.seeds):
                if seed in done:
                    draws.append(done[seed])
                    continue
                draws.append(self._drawn_anew(prepared, trainer, seed))
                if first:  # only what all processes took part in: others may not have read the file yet
                    kept.write(target, draws)
            found = found + kept.findings(draws, self.options.method, len(prepared.evaluation))
        return found

    def _drawn_anew(self, prepared: Prepared, trainer: Any, seed: int) -> Draw:
        """Another draw's figures, from the base anew."""
        self._console.print(f"draw of seed {seed}", highlight=False)
        config = replace(prepared.config, training=replace(prepared.config.training, seed=seed))
        drawn = self._pool.rows.select(self._pool.draw(config.data.labels or [], self.options.shots, seed))
        task = self.read_as
        rows = encode(self._filled(drawn), LABELLED, task, prepared.tokenizer, config.data)
        prepared = replace(prepared, config=config, rows=rows)
        device = pick_device()
        model = self._method.load(prepared, device, pick_dtype(config.model.dtype, device))
        arguments = copy.copy(trainer.args)
        arguments.seed = arguments.data_seed = seed
        arguments.save_strategy, arguments.report_to = SaveStrategy.NO, []
        baselines = self._without_training(prepared, model)
        optimizer = chosen_optimizer(config.training.optim, arguments, model)
        nan = StopAtNaN()
        own = self._method.trainer(prepared, model, arguments, [nan])
        set_optimizer(own, config.training.optim, optimizer)
        own.train()
        nan.check(model)
        guessed = self._guesses(self._method.fit(prepared, model), prepared, own)
        return self._figures(prepared, own, guessed, baselines)

    def _without_training(self, prepared: Prepared, model: Any) -> dict[str, list[int]]:
        if prepared.evaluation is None or not self.options.baselines:
            return {}
        return self._method.baselines(prepared, model)

    def _guesses(self, classifier: Classifier | None, prepared: Prepared, trainer: Any) -> list[int]:
        assert prepared.evaluation is not None
        if classifier is None:
            return classes(prepared, trainer, prepared.evaluation)
        return classes_of(classifier, prepared, trainer.model)

    def _figures(self, prepared: Prepared, trainer: Any, guessed: list[int], baselines: dict[str, list[int]]) -> Draw:
        assert prepared.evaluation is not None
        true = prepared.evaluation.rows["labels"]
        ways = {"trained": guessed} | baselines
        measured = {name: {"accuracy": accuracy(true, one), "f1": f1_macro(true, one)} for name, one in ways.items()}
        return Draw(prepared.config.training.seed, trainer.state.max_steps, measured)

    def _filled(self, rows: Any) -> Any:
        return rows if self._fill is None else Dataset.from_list([self._fill(row) for row in rows])

    def _task(self) -> str:
        """Of the model: what the method is for."""
        wanted, model = self._method.tasks, self.config.model
        if model.task != "auto":
            if model.task not in wanted:
                raise UserError(
                    f"model.task: expected {' or '.join(wanted)} for strategy.options.method {self.options.method}, "
                    f"got {model.task}"
                )
            return model.task
        described = bases.load_config(model)
        fitting = [task for task in wanted if fits(described, task)]
        if not fitting:
            expected = " or ".join(AUTO[task][2] for task in wanted)
            got = (getattr(described, "architectures", None) or [described.model_type])[0]
            raise UserError(
                f"model.name: expected {expected} for strategy.options.method {self.options.method}, "
                f"got {model.name}, which is {got}"
            )
        return fitting[0]


def _without_evaluation(arguments: Any) -> Any:
    """Nothing is chosen by rows that measure; a method's own batches have columns of their own."""
    changed = copy.copy(arguments)
    changed.eval_strategy = IntervalStrategy.NO
    changed.remove_unused_columns = False
    return changed
