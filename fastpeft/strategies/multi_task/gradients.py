"""What tasks share: copies, one for each task, of which the first is trained and the others follow.

In a mixed batch a row goes through its own task's adapter alone, so one backward leaves each task's gradient in its
own copy. Their products with each other (a Gramian) say how far the tasks pull against each other, and are all that
gradient surgery asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

AXES = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""Dimension that is the rank."""
CAGRAD = 0.4
"""c of CAGrad: how far its gradient may be from the mean. The paper's choice on most of its data."""
OF_SUMS = ("pcgrad", "nash-mtl")
"""Ways whose weights are of a sum; the others' are of a mean."""


@dataclass(frozen=True)
class Part:
    """One parameter that tasks share, whole or in its first ranks.

    Attributes:
        copies: one a task.
        axis, rank: the first `rank` along `axis` are shared; None for all.
    """

    copies: list[nn.Parameter]
    axis: int = 0
    rank: int | None = None

    @property
    def has_all_ranks(self) -> bool:
        return all(self.rank is None or copy.shape[self.axis] == self.rank for copy in self.copies)

    def shared(self, values: Tensor) -> Tensor:
        """A view of what is shared in a copy, or in its gradient."""
        return values if self.rank is None else values.narrow(self.axis, 0, self.rank)


def parts_of(model: Any, tasks: Sequence[str], rank: int, head: bool) -> list[Part]:
    """What the tasks' adapters share.

    Args:
        model: with an adapter of each task.
        rank: how many of the first ranks are shared; 0 for none.
        head: whether what is trained whole, as heads are, is shared too.
    """
    found = []
    for module in model.modules() if rank else ():
        if not isinstance(module, LoraLayer):
            continue
        for name, axis in AXES.items():
            held = getattr(module, name)
            if tasks[0] in held:
                weights = [held[task] if isinstance(held[task], nn.Parameter) else held[task].weight for task in tasks]
                found.append(Part(weights, axis, rank))
    for module in model.modules() if head else ():
        if isinstance(module, ModulesToSaveWrapper):
            each = [module.modules_to_save[task].parameters() for task in tasks]
            found += [Part(list(same)) for same in zip(*each, strict=True)]
    return found


class Shared:
    """All parts, and what becomes of the tasks' gradients on them.

    Args:
        parts: of `parts_of`; the copies get the first one's values at once.
        surgery: "sum", or how TorchJD weighs the tasks' gradients.
    """

    def __init__(self, parts: Sequence[Part], surgery: str = "sum") -> None:
        self._parts, self.surgery = parts, surgery
        self._weighting = None if surgery == "sum" else _weighting(surgery)
        self.follow()

    @property
    def count(self) -> int:
        """How many values are shared."""
        return sum(part.shared(part.copies[0]).numel() for part in self._parts)

    def follow(self) -> None:
        """Every copy gets the first one's values."""
        with torch.no_grad():
            for part in self._parts:
                first, *others = (part.shared(copy) for copy in part.copies)
                for other in others:
                    other.copy_(first)

    def gramian(self, present: Sequence[int]) -> Tensor:
        """(tasks, tasks), fp64 on the CPU: products of the gradients of the tasks that a step has."""
        found: Tensor | None = None
        for part in self._parts:
            rows = [self._gradient(part, task) for task in present]
            some = next((row for row in rows if row is not None), None)
            if some is None:
                continue
            filled = torch.stack([torch.zeros_like(some) if row is None else row for row in rows]).flatten(1).float()
            products = (filled @ filled.mT).double()
            found = products if found is None else found + products
        count = len(present)
        return torch.zeros(count, count, dtype=torch.float64) if found is None else found.cpu()

    def combine(self, present: Sequence[int], gramian: Tensor | None) -> Tensor:
        """Put what becomes of the tasks' gradients into the first copies, and none of it into the others.

        Args:
            present: numbers of the tasks that the step has.
            gramian: of these; None where it was not asked for, as a sum does not.

        Returns:
            What each was multiplied by, (tasks,) in the order of `present`.
        """
        weights = torch.ones(len(present), dtype=torch.float64)
        if self._weighting is not None and gramian is not None and len(present) > 1 and _weighable(gramian):
            weights = self._weighting(gramian)
            if self.surgery not in OF_SUMS:
                weights = weights * len(present)
        for part in self._parts:
            self._combine(part, list(zip(present, weights.tolist(), strict=True)))
        return weights

    def _combine(self, part: Part, weighed: list[tuple[int, float]]) -> None:
        first, *others = part.copies
        given = [(row, weight) for task, weight in weighed if (row := self._gradient(part, task)) is not None]
        if not given:
            return
        total = torch.zeros_like(given[0][0])
        for row, weight in given:
            total.add_(row, alpha=weight)
        if first.grad is None:
            first.grad = torch.zeros_like(first)
        part.shared(first.grad).copy_(total)
        for other in others:
            if part.has_all_ranks:
                other.grad = None
            elif other.grad is not None:
                part.shared(other.grad).zero_()

    def _gradient(self, part: Part, task: int) -> Tensor | None:
        gradient = part.copies[task].grad
        return None if gradient is None else part.shared(gradient)


def _weighable(gramian: Tensor) -> bool:
    """Whether no gradient is zero or overflowed, as the first ones of fp16 do."""
    return bool(gramian.isfinite().all()) and float(gramian.diagonal().min()) > 0


def cosines(gramian: Tensor) -> Tensor:
    """(tasks, tasks) of a Gramian's; not a number where a gradient is zero."""
    norms = gramian.diagonal().sqrt()
    return gramian / (norms[:, None] * norms[None, :])


def _weighting(surgery: str) -> Any:
    """TorchJD's weighting: of a Gramian, (tasks, tasks), what each gradient is multiplied by."""
    from torchjd import aggregation

    if surgery == "cagrad":
        return aggregation.CAGradWeighting(c=CAGRAD)
    if surgery == "nash-mtl":
        return _nash(aggregation.FairGradWeighting(alpha=1.0))
    kinds = {
        "pcgrad": "PCGrad",
        "mgda": "MGDA",
        "imtl-g": "IMTLG",
        "aligned-mtl": "AlignedMTL",
        "upgrad": "UPGrad",
        "dualproj": "DualProj",
    }
    return getattr(aggregation, f"{kinds[surgery]}Weighting")()


def _nash(fair: Any) -> Any:
    """Nash-MTL's weights w, Gw = 1/w of a Gramian G, which are those of FairGrad at alpha 1: no state, any tasks.

    The solver is given a Gramian of ordinary size, from whose weights those of any other follow.
    """

    def weighting(gramian: Tensor) -> Tensor:
        size = gramian.diagonal().mean()
        weights: Tensor = fair(gramian / size) / size.sqrt()
        return weights

    return weighting
