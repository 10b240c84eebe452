"""`strategy.options` of multi-task fine-tuning, and what of them can be told to be wrong before anything is read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from fastpeft.config import DataSection, FastpeftConfig, LoraSection
from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean
from fastpeft.requirements import require
from fastpeft.structured import build

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
TAKEN = ("default", "alone", "merged", "tensorboard", "runs")
"""Names of adapters and folders that a run has itself."""
EQUAL_RANKS = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
"""Ways of merging that add matrices A, and matrices B, of adapters up; PEFT's others multiply them first."""
SOLVERS = {"cagrad": "cvxpy", "nash-mtl": "scipy", "upgrad": "quadprog", "dualproj": "quadprog"}
"""Packages that TorchJD asks for what it solves."""
Merging = Literal[
    "linear",
    "svd",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
LORA = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
"""What `lora` may say: DoRA is not mixed in a batch, and the others change what the tasks' adapters have in common."""


@dataclass(frozen=True)
class Merge:
    """How the tasks' adapters become one after training, by PEFT's `add_weighted_adapter`.

    Attributes:
        methods: its combination_type, each tried by itself.
        weight: of each adapter; null: 1, where they share a part 1 / their number.
        density: share of the values that is kept, of ways that drop some.
    """

    methods: list[Merging]
    weight: float | None = None
    density: float = 0.5


@dataclass(frozen=True)
class MultiTaskOptions:
    """`strategy.options` of multi-task fine-tuning.

    Attributes:
        tasks: each task's data, by its name: the keys of `data`, whose values are those of `data` where it has none.
        adapters: one that all tasks share, one for each task, or both at once.
        shared_rank: rank of the shared one beside the tasks' own (adapters: both); null: lora.r.
        ranks: of tasks whose own adapter has another rank than lora.r.
        head: a classifier's head for each task, or one for all.
        sampling: how often a task's rows come: by their number, by that to the power of 1 / temperature, or more often
            the less of its loss a task has lost.
        temperature: of sampling by temperature; 1 is by number, a large one gives every task as much.
        weighting: of the tasks' losses: weights as given, or of learned uncertainties, or of how fast losses fall.
        weights: of the tasks' losses; 1 for those left out. The others multiply theirs by it.
        weight_rate: learning rate of uncertainties.
        dwa_temperature: of dwa; a large one makes weights more equal.
        window: steps over which losses are averaged for dwa and for sampling by loss.
        gradients: what becomes of the tasks' gradients on what they share: their sum, or one of TorchJD's ways.
        conflict_steps: steps between two entries of the conflict log; 0 for none.
        alone: train each task by itself too, on as many rows, to compare with.
        merge: merge the tasks' adapters at the end; null: do not.
        generate: how many prompts of each task's evaluation are answered, before training and after; 0 for none.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapters: Literal["shared", "per-task", "both"] = "shared"
    shared_rank: int | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    head: Literal["per-task", "shared"] = "per-task"
    sampling: Literal["size", "temperature", "loss"] = "size"
    temperature: float = 2.0
    weighting: Literal["equal", "uncertainty", "dwa"] = "equal"
    weights: dict[str, float] = field(default_factory=dict)
    weight_rate: float = 0.01
    dwa_temperature: float = 2.0
    window: int = 20
    gradients: Literal[
        "sum", "pcgrad", "cagrad", "mgda", "imtl-g", "aligned-mtl", "nash-mtl", "upgrad", "dualproj"
    ] = "sum"  # fmt: skip
    conflict_steps: int = 10
    alone: bool = False
    merge: Merge | None = None
    generate: int = 20

    @property
    def shares(self) -> bool:
        """Whether tasks train something together."""
        return self.adapters != "per-task" or self.head == "shared"

    def shared_of(self, section: LoraSection) -> int:
        """Rank of what all tasks' adapters have in common."""
        if self.adapters == "per-task":
            return 0
        return section.r if self.adapters == "shared" or self.shared_rank is None else self.shared_rank

    def rank_of(self, task: str, section: LoraSection) -> int:
        """Rank of a task's adapter, with what it shares."""
        own = 0 if self.adapters == "shared" else self.ranks.get(task, section.r)
        return self.shared_of(section) + own

    def section_of(self, task: str, section: LoraSection) -> LoraSection:
        """`lora` of a task's adapter: its rank, and the alpha that leaves `lora`'s factor as it is."""
        rank = self.rank_of(task, section)
        ratio = rank / section.r
        return replace(section, r=rank, alpha=section.alpha * (math.sqrt(ratio) if section.use_rslora else ratio))


def sections_of(config: FastpeftConfig, options: MultiTaskOptions) -> dict[str, DataSection]:
    """Each task's data.

    Raises:
        UserError: a key that `data` does not have, or a value of the wrong type.
    """
    common = asdict(config.data)
    found = {}
    for name, given in options.tasks.items():
        try:
            found[name] = build(DataSection, common | given, f"strategy.options.tasks.{name}")
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
    return found


def check(config: FastpeftConfig, options: MultiTaskOptions) -> None:
    """Raise UserError for what no run could do."""
    key = "strategy.options"
    _check_names(list(options.tasks))
    sections_of(config, options)
    for name, given in (("weights", options.weights), ("ranks", options.ranks)):
        for task, value in given.items():
            if task not in options.tasks:
                hint = did_you_mean(task, options.tasks)
                raise UserError(f"{key}.{name}: expected tasks of {', '.join(options.tasks)}, got {task!r}{hint}")
            if not 0 < value < math.inf:
                raise UserError(f"{key}.{name}.{task}: expected a number above 0, got {value}")
    for name in ("temperature", "weight_rate", "dwa_temperature"):
        if not 0 < (number := getattr(options, name)) < math.inf:
            raise UserError(f"{key}.{name}: expected a finite number above 0, got {number}")
    for name, least in (("shared_rank", 1), ("window", 2), ("conflict_steps", 0), ("generate", 0)):
        if (count := getattr(options, name)) is not None and count < least:
            raise UserError(f"{key}.{name}: expected at least {least}, got {count}")
    if options.shared_rank is not None and options.adapters != "both":
        raise UserError(f"{key}.shared_rank: expected null for adapters {options.adapters}, got {options.shared_rank}")
    if options.ranks and options.adapters == "shared":
        raise UserError(f"{key}.ranks: expected none for adapters shared, got {', '.join(options.ranks)}")
    if options.gradients != "sum":
        if not options.shares:
            raise UserError(f"{key}.gradients: expected sum for tasks that share nothing, got {options.gradients}")
        require("multi", "torchjd", "gradient surgery")
        if options.gradients in SOLVERS:
            require("multi", SOLVERS[options.gradients], f"strategy.options.gradients {options.gradients}")
    _check_lora(config)
    _check_merge(config, options)
    workers = config.training.extra.get("dataloader_num_workers", 0)
    if options.sampling == "loss" and workers:
        raise UserError(f"training.extra.dataloader_num_workers: expected 0 for sampling by loss, got {workers}")
    if (strategy := config.training.extra.get("train_sampling_strategy")) is not None:
        raise UserError(f"training.extra.train_sampling_strategy: expected {key}.sampling instead, got {strategy!r}")
    if config.training.extra.get("label_smoothing_factor"):
        raise UserError("training.extra.label_smoothing_factor: expected 0 under multi-task")


def _check_names(names: list[str]) -> None:
    key = "strategy.options.tasks"
    if len(names) < 2:
        raise UserError(f"{key}: expected at least two tasks, got {len(names)}; one is strategy.name task")
    for place, name in enumerate(names):
        if NAME.fullmatch(name) is None:
            raise UserError(f"{key}: expected names of letters, digits, - and _, got {name!r}")
        if name in TAKEN or name.startswith(("checkpoint-", "lora_", "modules_to_save")):
            raise UserError(f"{key}: expected another name, which no run has itself, got {name!r}")
        if (twin := next((one for one in names[:place] if one.lower() == name.lower()), None)) is not None:
            raise UserError(f"{key}: expected each name once, in small letters or capitals, got {twin!r} and {name!r}")


def _check_lora(config: FastpeftConfig) -> None:
    for name, allowed in LORA.items():
        if (value := getattr(config.lora, name)) not in allowed:
            wanted = " or ".join(map(str, allowed)).replace("[]", "none")
            raise UserError(f"lora.{name}: expected {wanted} under multi-task, got {value}")
    for name in ("lora_bias", "trainable_token_indices", "rank_pattern", "alpha_pattern", "target_parameters"):
        if value := config.lora.extra.get(name):
            raise UserError(f"lora.extra.{name}: expected none under multi-task, got {value}")


def _check_merge(config: FastpeftConfig, options: MultiTaskOptions) -> None:
    merge, key = options.merge, "strategy.options.merge"
    if merge is None:
        return
    if options.adapters == "shared":
        raise UserError(f"{key}: expected null for adapters shared, which are one already, got {merge.methods}")
    if config.lora.use_rslora:
        raise UserError("lora.use_rslora: expected false with strategy.options.merge, got true")
    if not merge.methods:
        raise UserError(f"{key}.methods: expected at least one, got none")
    if not 0 < merge.density <= 1:
        raise UserError(f"{key}.density: expected more than 0 up to 1, got {merge.density}")
    if merge.weight is not None and not 0 < merge.weight < math.inf:
        raise UserError(f"{key}.weight: expected more than 0, got {merge.weight}")
    ranks = {name: options.rank_of(name, config.lora) for name in options.tasks}
    if len(set(ranks.values())) > 1 and (unequal := [name for name in merge.methods if name in EQUAL_RANKS]):
        got = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise UserError(
            f"{key}.methods: {unequal[0]} expected adapters of one rank, got {got}; cat, svd and those that end in "
            "_svd take any"
        )
