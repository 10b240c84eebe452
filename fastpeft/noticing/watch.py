"""One training, looked at while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .batches import FIRST, FirstBatches, batch_of, facts_of, other_tokenizer
from .dependence import Dependence
from .gradients import LEAST, SETTLED, Gradients, all_finite, without_gradient
from .notices import Notice, Notices
from .origin import Call, loss_of, origin
from .readings import Readings, can_read
from .rows import leak

logger = logging.getLogger("fastpeft")

LOSSES = 3
"""Losses that are no number, while what is trained still is, until it is said: steps may be skipped for good reason."""
HELD = 16 << 20
"""Bytes of a batch that is held until the next, to be run again where numbers went wrong."""


def watch(model: Any, *, tokenizer: Any = None, train_dataset: Any = None, eval_dataset: Any = None) -> Watch:
    """Have it said, once each and with what to do, when a training runs but goes wrong.

        with fastpeft.watch(trainer):
            trainer.train()

    The same with a model around a loop of your own: `with fastpeft.watch(model, tokenizer=tokenizer):`. Looked for are
    labels that are all ignored, padding that is learned, token ids without an embedding or a tokenizer of another
    model, rows of the evaluation among those of the training, inputs that are all the same or that the loss does not
    depend on, adapters that get no gradient or that the optimizer does not hold, and numbers that are no numbers, with
    the first module that has them. The training's own numbers stay as they are, bit for bit.

    Args:
        model: that is trained, accelerated or not; or a Trainer of transformers or TRL, which has all of the following.
        tokenizer: of the model; without it, what is padding is told by the model's configuration.
        train_dataset, eval_dataset: to be compared with each other: `datasets.Dataset`s or lists of mappings, tokenized
            or not; the second may be a mapping of several by name.

    Returns:
        What watches, for as long as it is entered. Its `notices` are those so far; each is logged as a warning by the
        logger "fastpeft" when it is found.

    Raises:
        TypeError: `model` is neither.
        FloatingPointError: within `with`: an optimizer stepped by gradients that are no numbers, and what is trained
            has none any more. All later steps would be for nothing.
    """
    if isinstance(model, nn.Module):
        return Watch(model, tokenizer=tokenizer, datasets=(train_dataset, eval_dataset))
    if not isinstance(getattr(model, "model", None), nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or a Trainer of transformers, got {type(model).__name__}")

    def given(value: Any, name: str) -> Any:
        return getattr(model, name, None) if value is None else value

    return Watch(
        model.model,
        tokenizer=given(tokenizer, "processing_class"),
        datasets=(given(train_dataset, "train_dataset"), given(eval_dataset, "eval_dataset")),
        steps_before=lambda: int(model.state.global_step),
    )


class Watch:
    """What `watch` gives.

    Args:
        model, tokenizer: as of `watch`.
        datasets: to train and to evaluate on; None for what is not to be compared.
        steps_before: how many steps a run that goes on has had; asked at the first one.
        tell: called with each notice's text.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        datasets: tuple[Any, Any] = (None, None),
        steps_before: Callable[[], int] = lambda: 0,
        tell: Callable[[str], object] = logger.warning,
    ) -> None:
        self.model = model
        self._tokenizer, self._datasets, self._steps_before = tokenizer, datasets, steps_before
        self._notices = Notices(tell)
        self._hooks: list[Any] = []
        self._busy = False
        self._readings = Readings()
        self._dependence = Dependence()
        self._optimizers: WeakKeyDictionary[Optimizer, Gradients] = WeakKeyDictionary()
        self._call: Call | None = None
        self._before, self._step = 0, 0
        self._bad_losses, self._bad_step = 0, 0

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What was found so far."""
        return tuple(self._notices.found)

    def origin(self) -> str:
        """Where numbers that are none came from, as far as the last batch tells, and what to do; runs it again."""
        return self._by_itself(lambda: origin(self.model, self._call))

    def __enter__(self) -> Watch:
        described = facts_of(self.model, self._tokenizer)
        self._batches = FirstBatches(described, self._notices)
        self._notices.add("vocabulary", other_tokenizer(described, self._tokenizer))
        if all(rows is not None for rows in self._datasets):
            self._notices.add("leak", leak(*self._datasets))
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
            register_optimizer_step_pre_hook(self._before_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if error is None:
            self._finish()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._looks_at(module):
            return
        self._readings.read()
        if self._batches.seen < FIRST:
            self._batches.look(batch_of(args, kwargs))
        call = Call(args, kwargs)
        if self._dependence.due(self._step):
            self._by_itself(lambda: self._dependence.try_it(self.model, call))
            if self._dependence.found:
                self._notices.add("no-input", _SAME_LOSS)
        self._call = call if _bytes(call) <= HELD else None

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._looks_at(module) and (loss := loss_of(output)) is not None:
            self._readings.ask(loss.detach().float().reshape(1), self._loss_read)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not can_read():
            return
        self._readings.read()
        gradients = self._gradients_of(optimizer)
        if not gradients.ours:
            return
        if not self._step:
            self._before = self._steps_before()
        gradients.asked += 1
        self._step = step = max(self._step, gradients.asked)  # several optimizers may step after one forward
        parameters, norms = gradients.norms(optimizer) or ([], torch.zeros(1))
        self._readings.ask(norms, lambda host: self._norms_read(gradients, parameters, host, step))

    def _looks_at(self, module: nn.Module) -> bool:
        """Calls of the training alone: no evaluation, none of our own, no copy on another device."""
        return can_read() and not self._busy and module is self.model and module.training and torch.is_grad_enabled()

    def _gradients_of(self, optimizer: Optimizer) -> Gradients:
        given = [p for group in optimizer.param_groups for p in group["params"]]
        known = self._optimizers.get(optimizer)
        if known is None or len(known.given) != len(given) or not all(map(_is, known.given, given)):
            own = {id(p) for p in self.model.parameters()}
            known = self._optimizers[optimizer] = Gradients(given, ours=any(id(p) in own for p in given))
        return known

    def _loss_read(self, loss: Tensor) -> None:
        if bool(loss.isfinite().all()) or self._batches.only_ignored:  # of which a mean is none
            return
        self._bad_losses += 1
        if self._bad_losses == LOSSES and self._all_finite():
            step = self._before + self._step
            text = f"the loss of {LOSSES} batches by step {step} is no number: {self.origin()}"
            self._notices.add("loss", text)

    def _norms_read(self, gradients: Gradients, parameters: list[Tensor], norms: Tensor, step: int) -> None:
        before = gradients.telling
        finite = gradients.note(parameters, norms)
        if gradients.steps <= SETTLED and self._batches.seen >= FIRST:
            self._judge_labels()
        if before < gradients.telling == SETTLED:
            self._judge_gradients()
        if finite:
            self._bad_step = 0
            return
        self._bad_step = self._bad_step or self._before + step
        if any(notice.kind == "not-finite" for notice in self.notices) or self._all_finite():
            return  # said, or the step was skipped
        which = self._which(parameters, norms)
        text = (
            f"the gradients of step {self._bad_step} are no numbers{which}, nor is what they trained: {self.origin()}"
        )
        self._notices.add("not-finite", text)
        raise FloatingPointError(text)

    def _which(self, parameters: list[Tensor], norms: Tensor) -> str:
        """Where some gradients are numbers, the last that is none: backward passes go from the last to the first."""
        bad = [p for p, finite in zip(parameters, norms.isfinite().tolist(), strict=False) if not finite]
        if len(bad) == len(parameters):
            return ""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return f" ({len(bad)} of {len(parameters)}, the last is of {names.get(id(bad[-1]))})"

    def _all_finite(self) -> bool:
        return all_finite(p for p in self.model.parameters() if p.requires_grad)

    def _by_itself(self, work: Callable[[], Any]) -> Any:
        self._busy = True
        try:
            return work()
        finally:
            self._busy = False

    def _judge_labels(self) -> None:
        """No gradient came either: labels that are all ignored may be another loss's affair."""
        ours = [gradients for gradients in self._optimizers.values() if gradients.ours and gradients.steps]
        if self._batches.only_ignored and ours and not any(gradients.received for gradients in ours):
            self._notices.add("no-labels", self._batches.unlabelled)

    def _judge_gradients(self) -> None:
        if any(notice.kind == "no-labels" for notice in self.notices):
            return
        ours = [gradients for gradients in self._optimizers.values() if gradients.ours]
        self._notices.add("no-gradient", without_gradient(self.model, ours))

    def _finish(self) -> None:
        self._readings.read(wait=True)
        if self._batches.seen < FIRST:
            self._batches.judge()
            self._judge_labels()
        if any(LEAST <= gradients.telling < SETTLED for gradients in self._optimizers.values()):
            self._judge_gradients()


def _is(one: object, other: object) -> bool:
    return one is other


def _bytes(call: Call) -> int:
    return sum(value.nbytes for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))


_SAME_LOSS = (
    "the loss does not depend on the input: with the inputs of two rows swapped it is the same to the last bit, at "
    "three steps of the training; look at what the model computes its loss from"
)
