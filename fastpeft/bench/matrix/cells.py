"""One cell of the matrix: a family over a base with a method in a mode, served or not, equal to PEFT or not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from ..bases import DENSE, LLM_INT8, NF4, quantise
from ..combinations import Served, served
from ..left_out import reason_of
from ..methods import METHODS
from .families import FAMILIES, MIXTURE, Family, batch
from .parity import Parity, Step, compare, finite, step, truth

BASES = (DENSE, NF4, LLM_INT8)
CHOSEN = ("LoRA", "DoRA", "LoRA, two active adapters")
EXPERTS = "LoRA, stacked experts too"
"""Of `METHODS`; the last for mixtures, over a dense base."""
EAGER, CHECKPOINTING, AUTOCAST = MODES = ("eager", "checkpointing", "autocast")
NO_LINEAR = "no nn.Linear to quantise"


@dataclass(frozen=True, order=True)
class Cell:
    """The name of a cell."""

    family: str
    base: str
    method: str
    mode: str

    def __str__(self) -> str:
        return f"{self.family}: {self.method} over {self.base}, {self.mode}"


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        state: "compared"; "none" where the cell cannot exist without us, "failed" where it does with PEFT but not with
            us, "broken" where the process ended.
        reason: of a state that is not "compared"; of one that is, why PEFT's fp32 stood in for fp64.
        served: what the report says after the steps.
        parity: of the worst of loss and gradients in two steps.
    """

    state: Literal["compared", "none", "failed", "broken"]
    reason: str = ""
    served: Served = field(default_factory=lambda: Served(0, 0, (), 0, 0))
    parity: Parity | None = None


def cells(family: str) -> Iterator[Cell]:
    """All of a family."""
    of: dict[str, tuple[str, ...]] = dict.fromkeys(BASES, CHOSEN)
    if FAMILIES[family].kind == MIXTURE:
        of[DENSE] = (*CHOSEN, EXPERTS)
    return (Cell(family, base, method, mode) for base in BASES for method in of[base] for mode in MODES)


def run(family: Family, chosen: list[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """The outcome of each cell, as soon as it is known; models of one base and method are made once."""
    try:
        plain: Any = family.build()
        inputs = batch(plain)
    except Exception as error:
        yield from ((cell, Outcome("none", f"transformers: {reason_of(error)}")) for cell in chosen)
        return
    for base, method in dict.fromkeys((cell.base, cell.method) for cell in chosen):
        mine = [cell for cell in chosen if (cell.base, cell.method) == (base, method)]
        adapted = _adapted(plain, base, method, family.left)
        if isinstance(adapted, str):
            yield from ((cell, Outcome("none", adapted)) for cell in mine)
            continue
        try:
            exact, narrow = truth(adapted, inputs)
        except Exception as error:
            yield from ((cell, Outcome("none", f"plain PEFT: {reason_of(error)}")) for cell in mine)
            continue
        for cell in mine:
            yield cell, _outcome(adapted, cell.mode, inputs, exact, narrow)


def _adapted(plain: Any, base: str, method: str, left: tuple[str, ...]) -> nn.Module | str:
    """The PEFT model, or why there is none."""
    model = copy.deepcopy(plain)
    targets, linear = _targets(model, left)
    if base != DENSE and not linear:
        return NO_LINEAR
    try:
        quantise(model, base, linear)
    except Exception as error:
        return f"{base}: {reason_of(error)}"
    try:
        return METHODS[method].adapt(model, targets).train()
    except Exception as error:
        return f"PEFT: {reason_of(error)}"


def _targets(model: Any, named: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Paths of what is adapted, all linear layers but the heads; and of those of them that can be quantised."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    left = tuple(get_keys_to_not_convert(model))
    paths = {
        path: isinstance(module, nn.Linear)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and not any(f"{path}.".startswith(f"{each}.") for each in left)
        and path.rpartition(".")[2] not in named
    }
    # T5's kin cast to the dtype of their wo, uint8 in 4 bits; transformers leaves only some of them dense
    wide = (*(model._keep_in_fp32_modules or ()), "wo")
    return list(paths), [path for path, linear in paths.items() if linear and path.rpartition(".")[2] not in wide]


def _outcome(adapted: Any, mode: str, inputs: dict[str, Tensor], exact: Step, narrow: str) -> Outcome:
    import fastpeft

    autocast = mode == AUTOCAST
    model = copy.deepcopy(adapted)
    try:
        peft = _steps(model, mode, inputs, 1)[0]
    except Exception as error:
        return Outcome("none", f"plain PEFT: {reason_of(error)}")
    if not finite(peft):
        return Outcome("none", "plain PEFT: a loss or gradient that is not finite")
    try:
        fastpeft.accelerate(model)
        # the first step finds what shares an input
        found = [compare(step(model, inputs, autocast), peft, exact, not narrow) for _ in range(2)]
    except Exception as error:
        try:
            _steps(copy.deepcopy(adapted), mode, inputs, 3)
        except Exception as theirs:
            return Outcome("none", f"plain PEFT, in its next step: {reason_of(theirs)}")
        return Outcome("failed", f"fastpeft: {reason_of(error)}", served(model))
    worst = next((each for each in found if not each.kept), found[-1])
    if not math.isfinite(worst.error):
        return Outcome("failed", f"fastpeft: {worst.what}, an error of {worst.error}", served(model))
    return Outcome("compared", narrow, served(model), worst)


def _steps(model: Any, mode: str, inputs: dict[str, Tensor], count: int) -> list[Step]:
    if mode == CHECKPOINTING:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return [step(model, inputs, mode == AUTOCAST) for _ in range(count)]
