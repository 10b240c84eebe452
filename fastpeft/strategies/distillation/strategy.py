"""The strategy: teacher and student of a run, and what came of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from fastpeft.config import FastpeftConfig
from fastpeft.data.checks import leak_notes
from fastpeft.errors import UserError
from fastpeft.memory.plan.predicting import Setting
from fastpeft.metrics.findings import Findings
from fastpeft.models import bases
from fastpeft.models.devices import pick_device, pick_dtype
from fastpeft.models.tasks import HEADS, head_options
from fastpeft.paths import absolute
from fastpeft.training.evaluating import batches, evaluating
from fastpeft.training.preparing import Prepared
from fastpeft.training.trainers import build_trainer

from ..base import Strategy
from ..figures import Figures
from . import checks, report, stored, student
from .losses import Ways
from .matching import Matching
from .options import BASE, DistillationOptions
from .projection import PROJECTION, KeptProjection
from .teacher import ADAPTER, Choice, Teacher
from .trainer import Lesson, distilling


class Distillation(Strategy):
    """A student learns its teacher's distributions, and its inner states where that is asked for."""

    name: ClassVar[str] = "distillation"
    Options: ClassVar[type] = DistillationOptions
    tasks: ClassVar[tuple[str, ...]] = (
        "causal-lm",
        "seq2seq-lm",
        "masked-lm",
        "sequence-classification",
        "token-classification",
    )
    options: DistillationOptions

    def __init__(self, config: FastpeftConfig) -> None:
        super().__init__(config)
        if (source := self.options.student_of) is not None:  # a run that is resumed names the student that it made
            self.config = replace(config, model=replace(config.model, name=source))
        self._arguments: Any = None
        self._checkpoint: Path | None = None
        self._teacher: Teacher | None = None
        self._figures: Figures | None = None
        self._sides: dict[str, report.Side] = {}
        self._apart: Any = None

    def check(self) -> None:
        self.options.check()
        for name in ("label_smoothing_factor", "loss_type"):
            if name in self.config.training.extra:
                raise UserError(
                    f"training.extra.{name}: expected none with strategy.name {self.name}, whose loss is its own, "
                    f"got {self.config.training.extra[name]}"
                )
        if self.options.student_layers is not None and self.config.training.push_to_hub:
            raise UserError(
                "training.push_to_hub: expected false with strategy.options.student_layers, because an adapter is "
                "uploaded without the student's own weights, got true"
            )

    def prepare(self, console: Console) -> Prepared:
        prepared = super().prepare(console)
        options = self.options
        config = checks.seeing_attentions(prepared.config, options)
        prepared = replace(prepared, config=config)
        described = bases.load_config(config.model)
        if options.student_layers is not None:
            student.check(described, options.student_layers)
        self._choice = Choice(options, config, prepared.tokenizer)
        if options.matches:
            configs = self._student_config(described), self._teacher_config(described)
            self._matching = Matching(options, *configs, config.training.seed)
        checks.check_rows(prepared, options)
        self._is_stored = self._read_stored(prepared) is not None
        self.config = config = _with_absolute_paths(prepared.config)
        leaks = leak_notes(prepared.rows, prepared.evaluation, config.model.task)
        return replace(prepared, config=config, notes=[*prepared.notes, *leaks])

    def planned(self, setting: Setting) -> Setting:
        notes = []
        if self.options.on_policy:
            notes.append("what the student's own answers take while they are written is not counted")
        if self.options.matches:
            notes.append("inner states that are compared are not counted")
        setting = replace(setting, config=self._student_config(setting.config))
        if not self._choice.shares and not self._is_stored:
            teacher = self._choice.setting(setting)
            setting = replace(setting, teacher=teacher, teacher_streamed=self.options.teacher_streamed)
        elif self._choice.source is not None and not self._is_stored:
            notes.append("the teacher's adapter is not counted")
        return replace(setting, notes=(*setting.notes, *notes))

    def kept(self, config: FastpeftConfig) -> FastpeftConfig:
        if self.options.student_layers is None:
            return config
        given = {**config.strategy.options, "student_of": config.model.name}
        model = replace(config.model, name=str(self._student_folder(config)))
        return replace(config, model=model, strategy=replace(config.strategy, options=given))

    def settle(self, prepared: Prepared, arguments: Any, checkpoint: Path | None, console: Console) -> Any:
        self._arguments, self._checkpoint = arguments, checkpoint
        return arguments

    def load(self, prepared: Prepared, device: Any, dtype: Any) -> Any:
        if self.options.student_layers is not None:
            self._make_student(prepared)
            prepared = replace(prepared, config=self.kept(prepared.config))
        model = super().load(prepared, device, dtype)
        if self._choice.shares:
            self._teacher = self._choice.beside(model)
            if prepared.config.acceleration.enabled and self._choice.source is not None:
                import fastpeft

                fastpeft.accelerate(model, memory=prepared.memory.policy)  # the adapter that came since
        elif not self._is_stored:
            self._teacher = self._choice.load(device, dtype)
        return model

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        options = self.options
        matching = self._matching if options.matches else None
        if matching is not None and matching.projection is not None:
            kept = KeptProjection(model, matching.projection, self._checkpoint)
            callbacks = [*callbacks, kept]
        ways = Ways(options.beta, options.temperature, options.labels_weight, not prepared.config.acceleration.enabled)
        self._lesson = Lesson(
            self._teacher, None, ways, matching, prepared.config.model.task,
            options.on_policy, options.max_new_tokens, prepared.tokenizer.pad_token_id,
        )  # fmt: skip
        evaluation = None if prepared.watched is None else prepared.watched.rows
        return build_trainer(
            prepared.config.model.task, model, prepared.tokenizer, arguments, prepared.rows.rows, evaluation, callbacks,
            distilling(self._lesson),
        )  # fmt: skip

    def before(self, prepared: Prepared, trainer: Any) -> None:
        evaluated = prepared.evaluation is not None
        if self.options.top_k:
            with trainer.args.main_process_first(desc="the teacher's logits"):
                self._store(prepared, trainer)
        elif self._teacher is not None:
            with self._teacher.asked() as model:
                self._sides["teacher"] = self._side(prepared, trainer, model, self._teacher.has)
            if evaluated:
                self._apart = self._distance(prepared, trainer)
        self._sides["before"] = self._side(prepared, trainer, trainer.model, _is_students)
        if evaluated:
            self._figures = Figures(prepared, self.options.generate)
            self._figures.measure_before(prepared, trainer)

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        found = Findings() if self._figures is None else self._figures.findings(prepared, trainer)
        metrics = list(found.metrics)
        if self._apart is not None:
            task = prepared.config.model.task
            unit = {"masked-lm": "masked token", "sequence-classification": "row"}.get(task, "token")
            metrics.append(report.divergence_metric(self._apart, self._distance(prepared, trainer), unit))
        sections = [*found.sections]
        if "teacher" in self._sides:
            after = self._side(prepared, trainer, trainer.model, _is_students)
            names = self._teacher_and_student()
            sections.insert(0, report.section(self._sides["teacher"], self._sides["before"], after, *names))
        return replace(found, metrics=tuple(metrics), sections=tuple(sections))

    def _student_config(self, described: Any) -> Any:
        if (wanted := self.options.student_layers) is None:
            return described
        smaller = copy.deepcopy(described)
        text = smaller.get_text_config()
        text.num_hidden_layers = len(student.kept_of(text.num_hidden_layers, wanted))
        return smaller

    def _teacher_config(self, described: Any) -> Any:
        return described if self._choice.source is None else self._choice.source.config

    def _student_folder(self, config: FastpeftConfig) -> Path:
        return (Path(config.training.output_dir).expanduser() / student.FOLDER).resolve()

    def _make_student(self, prepared: Prepared) -> None:
        from transformers import set_seed

        config, wanted = prepared.config, self.options.student_layers
        assert wanted is not None
        set_seed(config.training.seed)  # a fresh classifier's first values
        head = head_options(config.model.task, config.data.labels, config.data.problem_type)
        folder = self._student_folder(config)
        with self._arguments.main_process_first(local=False, desc="the student's layers"):
            given = (config.model, config.model.task, wanted, folder, prepared.tokenizer, config.training.seed)
            student.make(*given, may_replace=self._checkpoint is None, **head)

    def _stored_file(self, config: FastpeftConfig) -> Path:
        given = self.options.stored
        folder = Path(config.training.output_dir).expanduser()
        return folder / stored.FILE if given is None else Path(given).expanduser()

    def _read_stored(self, prepared: Prepared) -> stored.StoredTeacher | None:
        """None where there are none yet, or where the run's own file is that of a former run, which is replaced."""
        config = prepared.config
        path = self._stored_file(config)
        if not self.options.top_k or not path.is_file():
            return None
        vocabulary = self._vocabulary(config)
        try:
            return stored.StoredTeacher(path, self._fingerprints(prepared), prepared.rows.rows, vocabulary)
        except UserError:
            if self.options.stored is None:
                return None
            raise

    def _vocabulary(self, config: FastpeftConfig) -> int:
        """Words, or classes, that the student has."""
        if config.model.task in HEADS:
            return len(config.data.labels or [])
        described = bases.load_config(config.model)
        return int(getattr(described, "decoder_vocab_size", None) or described.get_text_config().vocab_size)

    def _fingerprints(self, prepared: Prepared) -> dict[str, str]:
        source, config = self._choice.source, prepared.config
        names = [config.model.name] if source is None else [source.model.name, source.adapter or ""]
        commit = getattr(None if source is None else source.config, "_commit_hash", None)  # of the hub's
        kind = self.options.teacher_quantization or (source or config).model.quantization or "none"
        teacher = stored.fingerprint(filter(None, names), f"{kind} {config.model.dtype} {commit}")
        return stored.fingerprints(prepared.rows, teacher, self.options.top_k, config.data.max_length)

    def _store(self, prepared: Prepared, trainer: Any) -> None:
        """The teacher's logits and figures, unless they are there; then the teacher is not needed any more."""
        config = prepared.config
        path, shifted = self._stored_file(config), config.model.task == "causal-lm"
        if (found := self._read_stored(prepared)) is None:
            if self._teacher is None:
                device = pick_device()
                self._teacher = self._choice.load(device, pick_dtype(config.model.dtype, device))
            with self._teacher.asked() as model, evaluating(prepared, model) as forward:

                def answer(batch: dict[str, Any]) -> Any:
                    return forward({name: value for name, value in batch.items() if name != "labels"}).logits

                side = self._side(prepared, trainer, model, self._teacher.has)
                said = {"side": json.dumps(vars(side)), "evaluated": _rows_of(prepared)}
                given = batches(prepared, trainer, prepared.rows)
                about = self._fingerprints(prepared) | said
                rows, k, vocabulary = prepared.rows.rows, self.options.top_k, self._vocabulary(config)
                stored.write(path, about, rows, k, vocabulary, given, answer, shifted=shifted)
            found = self._read_stored(prepared)
        self._teacher = self._lesson.teacher = self._teacher if self._choice.shares else None
        self._lesson.stored = found
        assert found is not None
        teacher = report.read_side(found.about.get("side", ""))
        if teacher is not None and found.about.get("evaluated") == _rows_of(prepared):
            self._sides["teacher"] = teacher

    def _side(self, prepared: Prepared, trainer: Any, model: Any, has: Callable[[str], bool]) -> report.Side:
        values, size = report.size_of(model, has)
        if prepared.evaluation is None:
            return report.Side(values, size, 0.0, 0, {})
        seconds, tokens = report.timed(prepared, trainer, model)
        asked = copy.copy(trainer)
        asked.model = model
        metrics = Figures(prepared, 0).findings(prepared, asked).metrics
        return report.Side(values, size, seconds, tokens, {metric.name: metric.value for metric in metrics})

    def _distance(self, prepared: Prepared, trainer: Any) -> Any:
        assert self._teacher is not None and prepared.evaluation is not None
        return report.apart(prepared, trainer, self._teacher.asked, prepared.evaluation)

    def _teacher_and_student(self) -> tuple[str, str]:
        options, name = self.options, self._choice.name
        teacher = "the student's base without its adapter" if name == BASE else f"`{Path(name).name}`"
        if self._choice.shares and name != BASE:
            teacher += ", an adapter of the student's base"
        if options.teacher_quantization not in (None, "none"):
            teacher += f" in {options.teacher_quantization}"
        if options.student_layers is None:
            return teacher, f"`{Path(self.config.model.name).name}` with its adapter"
        count = student.count_of(bases.load_config(self.config.model))
        kept = ", ".join(map(str, student.kept_of(count, options.student_layers)))
        return teacher, f"layers {kept} of {count} of `{Path(self.config.model.name).name}` with an adapter"


def _is_students(name: str) -> bool:
    """Of a parameter in the student's model: no adapter that teaches, no matrix that is left behind."""
    return not {ADAPTER, PROJECTION} & {*name.split(".")}


def _rows_of(prepared: Prepared) -> str:
    return "none" if prepared.evaluation is None else prepared.evaluation.fingerprint()


def _with_absolute_paths(config: FastpeftConfig) -> FastpeftConfig:
    options = dict(config.strategy.options)
    for name in ("teacher", "stored", "student_of"):
        if isinstance(value := options.get(name), str) and value != BASE:
            options[name] = absolute(value)
    return replace(config, strategy=replace(config.strategy, options=options))
