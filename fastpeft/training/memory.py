"""What a run's layers do about memory: as its configuration says, or as a plan chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastpeft.config import FastpeftConfig, MemorySection
from fastpeft.errors import UserError
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.sizes import gib, gib_above, parse_size

if TYPE_CHECKING:
    import torch

    from fastpeft.memory.plan.planning import Plan
    from fastpeft.memory.plan.predicting import Setting

SIZES = ("budget_gib", "host_gib")
MOST = 2**50
"""Bytes of a GPU that is not asked about."""
OWN = (*SIZES, "activations", "streamed", "ring", "decoded")
"""Keys of `memory` that only an accelerated model has a use for."""


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
    def waits(self) -> bool:
        """Whether weights of streamed layers wait on the disk where the host's memory ends."""
        if self.plan is not None:
            return self.streams and self.plan.need.disk > 0
        return self.policy is not None and self.streams and self.policy.host_memory is not None

    @property
    def summary(self) -> str:
        """One line; empty where nothing was decided."""
        from fastpeft.memory.plan.rendering import policy_text

        if self.plan is not None:
            need, room = gib(self.plan.need.total), gib(self.plan.gpu_memory)
            disk = f"; {gib(self.plan.need.disk)} of weights on the disk" if self.plan.need.disk else ""
            return f"{policy_text(self.plan.policy.layers)}{disk}; {need} predicted, of {room}"
        return "" if self.policy is None else policy_text(self.policy.layers)

    @property
    def report(self) -> str:
        """All that was predicted, or the one line."""
        return self.summary if self.plan is None else str(self.plan)


def check_memory(config: FastpeftConfig) -> None:
    """What can be told of the section alone. Raises UserError."""
    section, plain = config.memory, MemorySection()
    for name in SIZES:
        size = getattr(section, name)
        if size is not None and not 0 < size < 2**20:
            raise UserError(f"memory.{name}: expected more than 0 and less than 2^20, got {size}")
    if section.ring < 1:
        raise UserError(f"memory.ring: expected at least 1, got {section.ring}")
    _decoded(section)
    set_ones = [name for name in OWN if getattr(section, name) != getattr(plain, name)]
    if set_ones and not config.acceleration.enabled:
        expected = _as_yaml(getattr(plain, set_ones[0]))
        raise UserError(f"memory.{set_ones[0]}: expected {expected} with acceleration.enabled false")
    if section.gradient_checkpointing and section.activations not in (None, "recompute"):
        raise UserError(
            f"memory.gradient_checkpointing: expected false with memory.activations {section.activations}, got true"
        )
    _host_has_use(section)


def _host_has_use(section: MemorySection) -> None:
    """Raises UserError for `host_gib` where the keys fix a policy that takes nothing of the host's memory, and no
    budget asks for a plan, which also counts a teacher's weights there."""
    if section.host_gib is None or section.budget_gib is not None or section.streamed:
        return
    if section.gradient_checkpointing or section.activations not in (None, "offload"):
        said = f"activations {section.activations}" if section.activations else "gradient_checkpointing true"
        raise UserError(f"memory.host_gib: expected null with memory.{said}, got {section.host_gib:g}")


def decide(
    config: FastpeftConfig, device: torch.device, dtype: torch.dtype, *, longest: int, processes: int,
    local: int | None = None, change: Callable[[Setting], Setting] = lambda setting: setting,
) -> Decision:  # fmt: skip
    """The policy of a run, before its model is loaded.

    The GPU's free memory is the budget where none is given. Nothing is planned for a CPU without a budget, nor where
    the keys say what to do, but for what they take of `memory.host_gib`, if it is given. Where what is available of the
    host's memory does not hold what would wait there, weights wait on the disk.

    Args:
        config: as resolved.
        longest: tokens of the longest row.
        processes: that train together.
        local: of these those on this machine, which share the host's memory alike; None for all.
        change: makes what is planned of a plain training, as `Strategy.planned`.

    Raises:
        UserError: it does not fit into the budget or cannot be planned, or several processes stream.
    """
    section = config.memory
    policy = fixed(section)
    if policy is not None and section.streamed and processes > 1:
        raise UserError("memory.streamed: expected false where several processes train together, got true")
    decided = policy is not None or section.gradient_checkpointing
    local = local or processes
    host = None if section.host_gib is None else int(section.host_gib * 2**30) // local
    plan_for = partial(
        _planned, config, dtype=dtype, longest=longest, processes=processes, local=local, change=change, host=host,
        device=device,
    )  # fmt: skip
    if section.budget_gib is None and policy is not None and host is not None:
        try:
            plan = plan_for(MOST, policy)
        except ValueError as error:
            raise UserError(f"memory.host_gib: {error}") from error
        _check_host(plan, section, local)
        return Decision(plan.policy)
    if section.budget_gib is None and (decided or device.type != "cuda" or not config.acceleration.enabled):
        return Decision(policy)
    known = MemoryPolicy(LayerPolicy("recompute")) if section.gradient_checkpointing and policy is None else policy
    if section.budget_gib is not None:
        try:
            plan = plan_for(int(section.budget_gib * 2**30), known)
        except ValueError as error:
            raise UserError(f"memory.budget_gib: {error}") from error
        _check_host(plan, section, local)
        if not plan.fits:
            raise UserError(
                f"memory.budget_gib: expected at least {gib(plan.need.total)}, which are predicted for this run, got "
                f"{section.budget_gib:g}; or {', or '.join(plan.changes)}"
            )
        return Decision(plan.policy if policy is not None or not decided else None, plan)
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    try:
        plan = plan_for(free, None)
    except Exception as error:  # of any kind, from a model's own code: nobody asked for a plan
        return Decision(note=f"memory was not planned: {' '.join(str(error).split())[:200]}")
    return Decision(plan.policy, plan, _note(plan, device, local))


def local_processes(processes: int) -> int:
    """Of all that train together those on this machine, as launchers tell each of them; all where none does."""
    from accelerate.utils import get_int_from_env

    names = ["LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"]
    return max(1, min(processes, get_int_from_env(names, processes)))


def _check_host(plan: Plan, section: MemorySection, local: int) -> None:
    """Raises UserError where `host_gib` alone is too little."""
    if plan.least_host is not None:
        assert plan.host_memory is not None
        got = round(plan.host_memory * local / 2**30, 2) if section.host_gib is None else section.host_gib
        raise UserError(
            f"memory.host_gib: expected at least {gib_above(plan.least_host * local):.2f} GiB, which are predicted for "
            f"this run, got {got:g}"
        )


def _note(plan: Plan, device: torch.device, local: int) -> str:
    need, room = plan.need, plan.gpu_memory
    if need.total > room:
        return f"this run may not fit: {gib(need.total)} are predicted, {gib(room)} are free"
    host = _available(device, local) if plan.host_memory is None else plan.host_memory
    if host is not None and need.host > host:
        return f"this run may not fit into the host's memory: {gib(need.host)} are predicted, of {gib(host)}"
    return ""


def _available(device: torch.device, local: int) -> int | None:
    """Bytes of the host's memory for one of so many processes, where the run is carried out; None for a CPU, on which
    nothing waits elsewhere."""
    from fastpeft.doctor.host import available_ram

    return available_ram()[1] // local if device.type == "cuda" else None


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
    config: FastpeftConfig, capacity: int, policy: MemoryPolicy | None, *, dtype: torch.dtype, longest: int,
    processes: int, local: int, change: Callable[[Setting], Setting], host: int | None, device: torch.device,
) -> Plan:  # fmt: skip
    """Raises ValueError for what cannot be planned.

    Args:
        host: bytes of the host's memory for this process; None for what is available, if nothing else fits into that.
    """
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
    if not _is_cached(config, described):
        model.mapped = (0,) * len(model.mapped)
    if policy is None and not model.skeleton.layers:
        policy = MemoryPolicy()

    def planned(policy: MemoryPolicy | None, host: int | None = host) -> Plan:
        return plan_on(config.model.name, model, capacity, host, policy, False, Rates())

    if policy is not None:
        return planned(policy)
    plan = planned(None)
    available = _available(device, local) if host is None else None
    if available is not None and plan.need.host > available:
        within = planned(None, available)
        plan = within if within.fits else plan
    chosen, limit = plan.policy, plan.host_memory
    if processes > 1 and any(layer.streamed for layer in chosen.different):
        limit = host
        chosen = MemoryPolicy(LayerPolicy("offload", tile=max(layer.tile for layer in chosen.different)))
    chosen = replace(chosen, ring=config.memory.ring, decoded=_decoded(config.memory))
    return plan if chosen == plan.policy else planned(chosen, limit)


def _is_cached(config: FastpeftConfig, described: Any) -> bool:
    """Whether the 4-bit weights will lie in files, which streamed layers can read."""
    stored = getattr(described, "quantization_config", None) is not None
    remote = config.model.trust_remote_code and bool(getattr(described, "auto_map", None))
    return config.model.packed_cache and not stored and not remote


def _as_yaml(value: Any) -> str:
    return {"None": "null", "False": "false"}.get(str(value), str(value))
