"""Learning to learn: an adapter from which a few steps on few rows of new classes go far.

Reptile (Nichol et al. 2018, arXiv 1803.02999) and first-order MAML (Finn et al. 2017, arXiv 1703.03400) over the
adapter's values; each adaptation begins with a linear head at the classes' means (Triantafillou et al. 2020,
arXiv 1903.03096), so that episodes may have any classes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from fastpeft.data.encoding import encode
from fastpeft.data.kinds import LABELLED
from fastpeft.errors import UserError
from fastpeft.models.devices import pick_device
from fastpeft.training.evaluating import evaluating
from fastpeft.training.preparing import Prepared

from .contrastive import Contrastive, Embedded
from .drawing import Pool
from .embedding import embed, padded
from .heads import LinearHead
from .method import classes_of

SCALE = 10.0
"""Of the head's scores: embeddings have length one, so that their products alone would tell classes hardly apart."""
EPISODES = 1000
"""Of an epoch."""


class Meta(Contrastive):
    """Episodes of other classes teach the adapter; the novel classes' few rows then adapt it."""

    def check(self) -> None:
        novel = self.options.novel or []
        if len(novel) < 2 or len(set(novel)) < len(novel):
            raise UserError(
                f"strategy.options.novel: expected at least two classes to adapt to for method {self.options.method}, "
                f"each once, got {self.options.novel}"
            )

    def measured(self, labels: Sequence[str]) -> list[str]:
        novel = self.options.novel or []
        if unknown := [name for name in novel if name not in labels]:
            raise UserError(f"strategy.options.novel: expected classes of {', '.join(labels)}, got {unknown[0]!r}")
        return list(novel)

    def begin(self, prepared: Prepared, pool: Pool) -> None:
        options = self.options
        if prepared.config.model.dtype == "float16":  # whose scaled gradients are not the trainer's to make here
            raise UserError(f"model.dtype: expected float32 or bfloat16 for method {options.method}, got float16")
        known = [label for label in pool.labels if label not in (options.novel or ())]
        ways = options.ways or len(options.novel or ())
        if len(known) < ways:
            hint = "" if options.ways is None else "; or fewer strategy.options.ways"
            raise UserError(
                f"strategy.options.novel: expected at least {ways} other classes to learn from, got {len(known)}{hint}"
            )
        self._ways, self._of = ways, dict[str, range]()
        self._rows: list[dict[str, Any]] = []
        for label in known:
            places = pool.all_of(label)
            if len(places) < options.shots + options.queries:
                raise UserError(
                    f"strategy.options.shots: expected at most {len(places)} with strategy.options.queries for class "
                    f"{label!r}, got {options.shots} and {options.queries}"
                )
            data = replace(prepared.config.data, labels=known)
            rows = encode(pool.rows.select(places), LABELLED, "sequence-classification", prepared.tokenizer, data)
            self._of[label] = range(len(self._rows), len(self._rows) + len(rows))
            self._rows += list(rows.rows)

    def trainer(self, prepared: Prepared, model: Any, arguments: Any, callbacks: list[Any]) -> Any:
        if arguments.world_size > 1:
            raise UserError(
                f"strategy.options.method: {self.options.method} expected one process, got {arguments.world_size}"
            )
        options, seed = self.options, prepared.config.training.seed

        def collate(batch: list[dict[str, int]]) -> dict[str, Tensor]:
            episodes = [self._episode(random.Random(f"{seed} {one['number']}")) for one in batch]
            rows = [self._rows[place] for episode in episodes for place, _, _ in episode]
            labels = [[label for _, label, _ in episode] for episode in episodes]
            asked = [[query for _, _, query in episode] for episode in episodes]
            return padded(prepared.tokenizer, rows) | {"labels": torch.tensor(labels), "asked": torch.tensor(asked)}

        return MetaTrainer(
            Adaptation(options.inner_steps, options.inner_rate),
            options.method == "reptile",
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"number": range(EPISODES)}),
            data_collator=collate,
            processing_class=prepared.tokenizer,
            callbacks=callbacks,
        )

    def fit(self, prepared: Prepared, model: Any) -> Embedded:
        """Adapts the model itself to the drawn rows."""
        rows = list(prepared.rows.rows)
        device = pick_device()
        batch = {name: value.to(device) for name, value in padded(prepared.tokenizer, rows).items()}
        labels = torch.tensor([row["labels"] for row in rows], device=device)
        adaptation = Adaptation(self.options.inner_steps, self.options.inner_rate)
        with evaluating(prepared, model), torch.enable_grad():
            weight, bias = adaptation(model, batch, labels)
        return Embedded(LinearHead(weight.cpu().numpy(), bias.cpu().numpy()))

    def baselines(self, prepared: Prepared, model: Any) -> dict[str, list[int]]:
        found = super().baselines(prepared, model)
        begun = [(parameter, parameter.detach().clone()) for parameter in _trained(model)]
        adapted = classes_of(self.fit(prepared, model), prepared, model)
        _put_back(begun)
        return {"prototypes": found["prototypes"], "the same adaptation of a fresh adapter": adapted}

    def _episode(self, generator: random.Random) -> list[tuple[int, int, bool]]:
        """(row, number of its class in the episode, whether it is a query)."""
        found = []
        for number, label in enumerate(generator.sample(sorted(self._of), self._ways)):
            drawn = generator.sample(self._of[label], self.options.shots + self.options.queries)
            found += [(place, number, place_in >= self.options.shots) for place_in, place in enumerate(drawn)]
        return found


@dataclass(frozen=True)
class Adaptation:
    """A few steps of gradient descent on few rows, on the adapter and on a linear head that begins at the means.

    Attributes:
        steps: of gradient descent, each on all rows.
        rate: its learning rate.
    """

    steps: int
    rate: float

    def __call__(self, model: Any, batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Changes the model's trained values; gives the head's weight (classes, width) and bias (classes,)."""
        trained = _trained(model)
        with torch.no_grad():
            vectors = embed(model, batch)
            means = torch.stack([vectors[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
        weight = (2 * SCALE * means).requires_grad_()
        bias = (-SCALE * means.square().sum(-1)).requires_grad_()
        for _ in range(self.steps):
            loss = head_loss(model, batch, labels, weight, bias)
            values = [*trained, weight, bias]
            gradients = torch.autograd.grad(loss, values, allow_unused=True)
            with torch.no_grad():
                for value, gradient in zip(values, gradients, strict=True):
                    if gradient is not None:
                        value.sub_(gradient, alpha=self.rate)
        return weight.detach(), bias.detach()


class MetaTrainer(Trainer):
    """Each row of a batch is an episode; the optimizer gets the gradient that its adaptation points to.

    Args:
        adaptation: to an episode's support.
        reptile: the gradient is from the adapted values back to where they began (Reptile), else that of the queries'
            loss at the adapted values (first-order MAML).
    """

    def __init__(self, adaptation: Adaptation, reptile: bool, **given: Any) -> None:
        super().__init__(**given)
        self._adaptation, self._reptile = adaptation, reptile
        self.remove_callback(PrinterCallback)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels, asked = inputs.pop("labels"), inputs.pop("asked")
        episodes, each = labels.shape
        trained = _trained(model)
        begun = [(parameter, parameter.detach().clone()) for parameter in trained]
        total = torch.zeros((), device=labels.device)
        share = 1 / (episodes * self.current_gradient_accumulation_steps)
        for number in range(episodes):
            part = {name: value[number * each : (number + 1) * each] for name, value in inputs.items()}
            query = asked[number]
            support = {name: value[~query] for name, value in part.items()}
            queries = {name: value[query] for name, value in part.items()}
            with self.compute_loss_context_manager():
                head = self._adaptation(model, support, labels[number][~query])
                loss = head_loss(model, queries, labels[number][query], *head)
            total += loss.detach() / episodes
            if self._reptile:
                length = self._adaptation.steps * self._adaptation.rate
                gradients = [(start - parameter.detach()) / length for parameter, start in begun]
            else:
                gradients = list(torch.autograd.grad(loss, trained, allow_unused=True))
            _put_back(begun)
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    gradient = gradient * share
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return total / self.current_gradient_accumulation_steps


def head_loss(model: Any, batch: dict[str, Tensor], labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean cross-entropy of a linear head on the embeddings of a padded batch."""
    return torch.nn.functional.cross_entropy(embed(model, batch) @ weight.T + bias, labels)


def _trained(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _put_back(values: list[tuple[Any, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
