"""Who teaches: a model of its own, or the student's base with another adapter or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.memory.plan.predicting import Setting
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.models import tuned
from fastpeft.models.tasks import HEADS, fits

from .options import BASE, DistillationOptions
from .projection import PROJECTION

KEY = "strategy.options.teacher"
ADAPTER = "teacher"
SHOWN = 3
"""Tokens that a message about two vocabularies names."""


class Teacher(Protocol):
    """Whoever answers."""

    def asked(self) -> AbstractContextManager[Any]:
        """The model, in evaluation mode and without gradients; everything is as before when the context ends."""

    def has(self, name: str) -> bool:
        """Whether a parameter of the model that is asked is the teacher's, and not the student's alone."""

    def unsaved(self) -> AbstractContextManager[None]:
        """What the student's adapter is saved within, so that nothing of the teacher goes along."""


class Another:
    """A model of its own."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @contextmanager
    def asked(self) -> Iterator[Any]:
        with torch.no_grad():
            yield self.model

    def has(self, name: str) -> bool:
        return True

    @contextmanager
    def unsaved(self) -> Iterator[None]:
        yield


class SameBase:
    """The student's own weights, its adapter off, or another adapter in its place.

    Args:
        student: a PEFT model.
        adapter: the folder or hub ID of the other adapter, which is loaded beside the student's; None for none.
    """

    def __init__(self, student: Any, adapter: str | None) -> None:
        self._student, self._own = student, student.active_adapter
        self._named = adapter is not None
        if adapter is not None:
            try:
                student.load_adapter(adapter, ADAPTER, is_trainable=False)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise UserError(f"{KEY}: {adapter} does not fit the student's base: {_first(error)}") from error

    @contextmanager
    def asked(self) -> Iterator[Any]:
        student = self._student
        training = student.training
        student.eval()
        try:
            with torch.no_grad():
                if not self._named:
                    with student.disable_adapter():
                        yield student
                    return
                student.set_adapter(ADAPTER, inference_mode=True)
                try:
                    yield student
                finally:
                    student.set_adapter(self._own)
        finally:
            student.train(training)

    def has(self, name: str) -> bool:
        return not {self._own, PROJECTION} & {*name.split(".")}

    @contextmanager
    def unsaved(self) -> Iterator[None]:
        known = self._student.peft_config.pop(ADAPTER, None)  # PEFT saves all that it knows of
        try:
            yield
        finally:
            if known is not None:
                self._student.peft_config[ADAPTER] = known


class Choice:
    """The teacher that the options name, found out without loading weights.

    Args:
        options: checked.
        config: of the run, as resolved; `model` is the student's, or with student_layers what it is made of.
        tokenizer: the student's.

    Raises:
        UserError: there is no such teacher, it does something else, or its vocabulary or classes are others.
    """

    def __init__(self, options: DistillationOptions, config: FastpeftConfig, tokenizer: Any) -> None:
        self._options, self._config = options, config
        self.name = options.teacher or config.model.name
        self.source: tuned.Source | None = None
        if self.name == BASE:
            return
        found = tuned.find(self.name, key=KEY, trust_remote_code=config.model.trust_remote_code)
        task = config.model.task
        if found.adapter is None and not fits(found.config, task):
            raise UserError(f"{KEY}: expected a model for task {task}, got {self.name}, which is {_kind(found)}")
        if found.adapter is not None and found.task != task:
            raise UserError(f"{KEY}: expected an adapter for task {task}, got {self.name}, which is for {found.task}")
        self.source = replace(found, task=task, model=replace(found.model, attention=config.model.attention))
        if self.shares and (options.teacher_quantization is not None or options.teacher_streamed):
            name = "teacher_streamed" if options.teacher_streamed else "teacher_quantization"
            raise UserError(
                f"strategy.options.{name}: expected none with {self.name}, an adapter of the student's own base"
            )
        if found.model.name != config.model.name or found.tokenizer_from != found.model.name:
            check_vocabularies(tokenizer, _naming_teacher(tuned.load_tokenizer, self.source), self.name)
        if task in HEADS:
            _check_classes(self.source, config.data.labels or [])

    @property
    def shares(self) -> bool:
        """Whether its base's weights are the student's."""
        if self.source is None:
            return True
        ours, theirs = self._config.model, self.source.model
        return (
            self.source.adapter is not None
            and self._options.student_layers is None
            and (theirs.name, theirs.revision) == (ours.name, ours.revision)
            and (theirs.quantization or "none") == (ours.quantization or "none")
        )

    def setting(self, student: Setting) -> Setting:
        """What memory is planned for it, beside what is planned for the student; not where it `shares`.

        Raises:
            ValueError: it is stored in a way that no plan follows.
        """
        assert self.source is not None
        kind = self._options.teacher_quantization or self.source.model.quantization or "none"
        if kind == "int8":
            raise ValueError("expected strategy.options.teacher_quantization none, nf4 or fp4, got int8")
        return Setting(
            self.source.config, student.task, student.tokens, student.rows, kind in ("nf4", "fp4"), student.dtype,
            None, device=student.device,
        )  # fmt: skip

    def load(self, device: Any, dtype: Any) -> Another:
        """A model of its own, accelerated where the student is."""
        import fastpeft

        assert self.source is not None
        options, streamed = self._options, self._options.teacher_streamed
        home = torch.device("cpu") if streamed else device
        base, fresh = _naming_teacher(tuned.load_base, self.source, home, dtype, options.teacher_quantization)
        model = base if self.source.adapter is None else _naming_teacher(tuned.attach, self.source, base)
        _naming_teacher(tuned.check_values, self.source, fresh)
        model = model.eval().requires_grad_(False)
        if self._config.acceleration.enabled or streamed:
            memory = MemoryPolicy(LayerPolicy(streamed=True)) if streamed else None
            fastpeft.accelerate(model, memory=memory)
        if home != device:
            model.to(device)
        return Another(model)

    def beside(self, student: Any) -> SameBase:
        """The student's base as the teacher; only where it `shares`."""
        if self.source is None:
            return SameBase(student, None)
        return SameBase(student, str(_naming_teacher(tuned.adapter_folder, self.source, student)))


def check_vocabularies(student: Any, teacher: Any, name: str) -> None:
    """Raise UserError unless two tokenizers give each token the same number."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if not different:
        return
    shown = ", ".join(f"{token!r} ({ours.get(token, '-')}, {theirs.get(token, '-')})" for token in different[:SHOWN])
    raise UserError(
        f"{KEY}: expected the student's tokens under the same numbers, got {len(different):,} in {name} that are not, "
        f"such as {shown} (the student's number, the teacher's; - for none); take a teacher or a student of the same "
        "family, or let the teacher write answers and learn them by strategy task"
    )


def _check_classes(source: tuned.Source, labels: list[str]) -> None:
    theirs = source.labels or []
    if theirs != labels:
        raise UserError(
            f"{KEY}: expected the classes {', '.join(labels)} in this order, as data.labels has them, "
            f"got {', '.join(theirs) or 'none'}"
        )


def _naming_teacher(function: Any, *given: Any) -> Any:
    """What a function gives, its errors said of the teacher."""
    try:
        return function(*given)
    except UserError as error:
        raise UserError(f"{KEY}: {str(error).removeprefix('MODEL: ')}") from error


def _kind(source: tuned.Source) -> str:
    return str((source.config.architectures or [source.config.model_type])[0])


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
