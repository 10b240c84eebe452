"""What a run's layers do about memory: as its configuration says, or as a plan chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastpeft.config import FastpeftConfig, MemorySection
from fastpeft.errors import UserError
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.sizes import gib, parse_size

if TYPE_CHECKING:
    import torch

    from fastpeft.memory.plan.planning import Plan
    from fastpeft.memory.plan.predicting import Setting

OWN = ("activations", "streamed", "ring", "decoded")
"""Keys of `memory` that only an accelerated model has a use for; `budget_gib` is one more."""


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        policy: for `accelerate`; None leaves it to the model, and to the trainer's own checkpointing.
        plan: that predicted it; None where nothing was predicted.
        note: what should be looked at; empty if nothing.
    """

    policy: MemoryPolicy | None = None
    plan: Plan | None = None
    note: str = ""

    @property
    def streams(self) -> bool:
        return self.policy is not None and any(layer.streamed for layer in self.policy.different)

    @property
    def summary(self) -> str:
        """One line; empty where nothing was decided."""
        from fastpeft.memory.plan.rendering import policy_text

        if self.plan is not None:
            need, room = gib(self.plan.need.total), gib(self.plan.gpu_memory)
            return f"{policy_text(self.plan.policy.layers)}; {need} predicted, of {room}"
        return "" if self.policy is None else policy_text(self.policy.layers)

    @property
    def report(self) -> str:
        """All that was predicted, or the one line."""
        return self.summary if self.plan is None else str(self.plan)


def check_memory(config: FastpeftConfig) -> None:
    """What can be told of the section alone. Raises UserError."""
    section, plain = config.memory, MemorySection()
    if section.budget_gib is not None and not 0 < section.budget_gib < 2**20:
        raise UserError(f"memory.budget_gib: expected more than 0 and less than 2^20, got {section.budget_gib}")
    if section.ring < 1:
        raise UserError(f"memory.ring: expected at least 1, got {section.ring}")
    _decoded(section)
    set_ones = [name for name in ("budget_gib", *OWN) if getattr(section, name) != getattr(plain, name)]
    if set_ones and not config.acceleration.enabled:
        expected = _said(getattr(plain, set_ones[0]))
        raise UserError(f"memory.{set_ones[0]}: expected {expected} with acceleration.enabled false")
    if section.gradient_checkpointing and section.activations not in (None, "recompute"):
        raise UserError(
            f"memory.gradient_checkpointing: expected false with memory.activations {section.activations}, got true"
        )


def decide(
    config: FastpeftConfig, device: torch.device, dtype: torch.dtype, *, longest: int, processes: int,
    change: Callable[[Setting], Setting] = lambda setting: setting,
) -> Decision:  # fmt: skip
    """The policy of a run, before its model is loaded.

    The GPU's free memory is the budget where none is given. Nothing is planned for a CPU without a budget, nor where
    the keys say what to do.

    Args:
        config: as resolved.
        longest: tokens of the longest row.
        processes: that train together.
        change: makes what is planned of a plain training, as `Strategy.planned`.

    Raises:
        UserError: it does not fit into the budget or cannot be planned, or several processes stream.
    """
    section = config.memory
    policy = fixed(section)
    if policy is not None and section.streamed and processes > 1:
        raise UserError("memory.streamed: expected false where several processes train together, got true")
    said = policy is not None or section.gradient_checkpointing
    if section.budget_gib is None and (said or device.type != "cuda" or not config.acceleration.enabled):
        return Decision(policy)
    known = MemoryPolicy(LayerPolicy("recompute")) if section.gradient_checkpointing and policy is None else policy
    if section.budget_gib is not None:
        try:
            plan = _planned(config, int(section.budget_gib * 2**30), known, dtype, longest, processes, change)
        except ValueError as error:
            raise UserError(f"memory.budget_gib: {error}") from error
        if not plan.fits:
            raise UserError(
                f"memory.budget_gib: expected at least {gib(plan.need.total)}, which are predicted for this run, got "
                f"{section.budget_gib:g}; or {', or '.join(plan.changes)}"
            )
        return Decision(policy if said else plan.policy, plan)
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    try:
        plan = _planned(config, free, None, dtype, longest, processes, change)
    except Exception as error:  # of any kind, from a model's own code: nobody asked for a plan
        return Decision(note=f"memory was not planned: {' '.join(str(error).split())[:200]}")
    note = "" if plan.fits else f"this run may not fit: {gib(plan.need.total)} are predicted, {gib(free)} are free"
    return Decision(plan.policy, plan, note)


def fixed(section: MemorySection) -> MemoryPolicy | None:
    """What the keys say by themselves; None where they leave it open."""
    if section.activations is None and not section.streamed:
        return None
    kept = section.activations or ("recompute" if section.gradient_checkpointing else "keep")
    return MemoryPolicy(LayerPolicy(kept, section.streamed), decoded=_decoded(section), ring=section.ring)


def _decoded(section: MemorySection) -> int:
    if section.decoded == 0:
        return 0
    try:
        return parse_size(section.decoded, "memory.decoded")
    except ValueError as error:
        raise UserError(str(error)) from error


def _planned(
    config: FastpeftConfig, capacity: int, policy: MemoryPolicy | None, dtype: torch.dtype, longest: int,
    processes: int, change: Callable[[Setting], Setting],
) -> Plan:  # fmt: skip
    """Raises ValueError for what cannot be planned."""
    from fastpeft.memory.plan.optimizer_state import OPTIMIZERS
    from fastpeft.memory.plan.planning import plan_on
    from fastpeft.memory.plan.predicting import Model, Setting
    from fastpeft.memory.plan.timing import Rates
    from fastpeft.models.bases import load_config
    from fastpeft.models.tasks import head_options

    training = config.training
    if training.optim not in OPTIMIZERS:
        raise ValueError(f"expected training.optim to be one of {', '.join(OPTIMIZERS)}, got {training.optim!r}")
    if config.model.quantization == "int8":
        raise ValueError("expected model.quantization none, nf4 or fp4, got 'int8'")
    described: Any = load_config(config.model)
    for name, value in head_options(config.model.task, config.data.labels, config.data.problem_type).items():
        setattr(described, name, value)
    setting = Setting(
        described, config.model.task, longest, training.per_device_train_batch_size,
        config.model.quantization in ("nf4", "fp4"), dtype, config.lora, training.optim,
        accumulated=training.gradient_accumulation_steps > 1,
    )  # fmt: skip
    model = Model(change(setting))
    if policy is None and not model.skeleton.layers:
        policy = MemoryPolicy()

    def planned(policy: MemoryPolicy | None) -> Plan:
        return plan_on(config.model.name, model, capacity, None, policy, False, Rates())

    if policy is not None:
        return planned(policy)
    plan = planned(None)
    chosen = plan.policy
    if processes > 1 and any(layer.streamed for layer in chosen.different):
        chosen = MemoryPolicy(LayerPolicy("offload", tile=max(layer.tile for layer in chosen.different)))
    chosen = replace(chosen, ring=config.memory.ring, decoded=_decoded(config.memory))
    return plan if chosen == plan.policy else planned(chosen)


def _said(value: Any) -> str:
    return {"None": "null", "False": "false"}.get(str(value), str(value))
