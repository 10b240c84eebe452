"""The fastest policy that fits, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..policy import LayerPolicy, MemoryPolicy
from ..trace.composing import Peak
from .predicting import Model
from .timing import Rates, hidden_from, read_hidden_from, seconds

CONTEXT = 512 << 20
"""Bytes of a process's CUDA context with its libraries' kernels; differs from GPU to GPU."""
RESERVE = 0.03
"""Of the GPU's memory, for the allocator's fragments."""
GRAIN = 1 << 20
"""Bytes to which the least of the host's memory is found."""


@dataclass(frozen=True)
class Need:
    """Bytes of a training under a policy, and its time beside that of keeping all.

    Attributes:
        static: base, adapters, gradients of earlier batches and optimizer on the GPU.
        step: what a step takes at the most beside these.
        gradients: of what was kept then, those that the step has made.
        purposes: (what for, bytes) of what is not kept then, where that is known.
        saved: by how much what is kept grows with each layer; offloaded inputs leave two layers later.
        total: with context and fragments.
        host: in the host's memory, pinned.
        disk: of streamed weights those that find no room there, and wait in files.
        slowdown: time of a step over that with everything kept and resident, told from `Rates`.
        hidden_from: tokens of a forward pass from which on copies of streamed weights cost no time; None without any.
        read_hidden_from: the same of what is read from the disk.
    """

    policy: MemoryPolicy
    static: int
    step: int
    when: str
    kept: int
    loss: int
    working: int
    total: int
    host: int
    slowdown: float
    hidden_from: int | None = None
    gradients: int = 0
    purposes: tuple[tuple[str, int], ...] = ()
    saved: tuple[int, ...] = ()
    disk: int = 0
    read_hidden_from: int | None = None


def need(
    model: Model, policy: MemoryPolicy, rows: int, tokens: int, capacity: int, rates: Rates, host: int | None = None
) -> Need:
    """Bytes and time under a policy.

    Args:
        host: bytes of the host's memory, beyond which streamed weights wait on the disk, as the policy then says; None
            where only those wait that the policy itself has no room for.
    """
    layers = policy.of(len(model.skeleton.order))
    peak = model.peak(layers, rows, tokens)
    spans = zip(model.spans(rows, tokens), layers, strict=True)
    offloaded = sum(span.all * span.width for span, each in spans if each.activations == "offload")
    offloaded *= model.setting.dtype.itemsize
    streamed = [size for size, each in zip(model.streamed_bytes, layers, strict=True) if each.streamed]
    others = model.host + offloaded
    if host is not None and others + sum(streamed) > host and any(model.mapped):
        room = max(0, host - others)
        policy = replace(policy, host_memory=room if policy.host_memory is None else min(room, policy.host_memory))
    waiting = on_disk(model, layers, policy.host_memory)
    static = sum(model.bytes.values()) + model.gradients + model.optimizer - sum(streamed) + in_turns(streamed, policy)
    static += model.batches.nbytes(rows)
    peak = _with_optimizer(model, peak)
    step = peak.size
    total = static + step + CONTEXT + int(RESERVE * capacity)
    kept = (LayerPolicy(),) * len(layers)
    slowdown = seconds(model, layers, rows, tokens, rates, waiting)
    slowdown /= seconds(model, kept, rows, tokens, rates)
    return Need(
        policy, static, step, peak.when, peak.kept, peak.loss, peak.working, total,
        others + sum(streamed) - sum(waiting), slowdown, hidden_from(model, layers, rates), peak.gradients,
        peak.purposes, peak.saved, sum(waiting), read_hidden_from(model, waiting, rates),
    )  # fmt: skip


def on_disk(model: Model, layers: Sequence[LayerPolicy], room: int | None) -> list[int]:
    """Bytes of each layer's weights that stay in files, where streamed ones may take so much of the host's memory: who
    comes first has it."""
    found = []
    for size, mapped, each in zip(model.streamed_bytes, model.mapped, layers, strict=True):
        waiting = 0
        if room is not None and each.streamed:
            waiting = min(mapped, max(0, size - room))
            room = max(0, room - (size - waiting))
        found.append(waiting)
    return found


def _with_optimizer(model: Model, peak: Peak) -> Peak:
    """Or the optimizer's step, when all activations are gone: gradients, and temporaries as large as these."""
    if not model.setting.trains:
        return peak
    made = model.bytes["trained"] - model.gradients
    size = made + (model.bytes["trained"] if model.setting.optimizer == "adamw_torch" else 0)
    return (
        peak
        if size <= peak.size
        else peak._replace(size=size, when="optimizer", kept=made, gradients=made, purposes=())
    )


def in_turns(streamed: Sequence[int], policy: MemoryPolicy) -> int:
    """Bytes on the device of layers of so many bytes that take turns in it."""
    return sum(sorted(streamed)[-policy.ring :])


KEEP, SELECTIVE, RECOMPUTE, OFFLOAD = (LayerPolicy(kind) for kind in ("keep", "selective", "recompute", "offload"))
STREAMED, LEAST = LayerPolicy("recompute", streamed=True), LayerPolicy("offload", streamed=True)
TILE = 4096
"""Tokens of the tiles that are chosen."""

Mixes = tuple[tuple[LayerPolicy, LayerPolicy], ...]
"""(what some of the first layers do, what the others do)"""
RESIDENT: tuple[Mixes, ...] = (
    ((SELECTIVE, KEEP), (RECOMPUTE, KEEP), (RECOMPUTE, SELECTIVE)),
    ((OFFLOAD, RECOMPUTE),),
)
STREAMING: tuple[Mixes, ...] = (((STREAMED, RECOMPUTE),), ((LEAST, OFFLOAD), (LEAST, STREAMED)))


def tiled(policy: LayerPolicy) -> LayerPolicy:
    return replace(policy, tile=TILE)


def _in_tiles(step: Mixes) -> Mixes:
    """Every layer: one without tiles needs as much at its turn as if all were so. "keep" has none."""
    return tuple((tiled(first), tiled(others)) for first, others in step if others != KEEP)


STEPS = (*RESIDENT, *map(_in_tiles, RESIDENT), *STREAMING, *map(_in_tiles, STREAMING))
"""A later step is tried where no earlier one is enough. Tiles, which round differently, come where what rounds alike
does not fit; before streamed weights, which are told to take 1 % less time at the best, where copies hide, and take the
base to the host."""


def has_tiles(model: Model, rows: int, tokens: int) -> bool:
    """Whether tiles make a difference."""
    spans = [model.span(layer, rows, tokens) for layer in range(len(model.work))]
    return any(work.gates and span.all > TILE for work, span in zip(model.work, spans, strict=True))


def choose(model: Model, rows: int, tokens: int, capacity: int, host: int | None, rates: Rates) -> Need:
    """The cheapest policy in time of the first of STEPS that fits; where none does, the one that needs least.

    Where the host's memory ends first, weights wait on the disk.
    """
    found = _choose(model, rows, tokens, capacity, host, rates, False)
    if host is None or (found.total <= capacity and found.host <= host) or not any(model.mapped):
        return found
    return _choose(model, rows, tokens, capacity, host, rates, True)


def _choose(model: Model, rows: int, tokens: int, capacity: int, host: int | None, rates: Rates, waits: bool) -> Need:
    """As `choose`; whether streamed weights may wait on the disk."""
    count = len(model.skeleton.order)

    def of(first: LayerPolicy, some: int, others: LayerPolicy) -> Need:
        policy = MemoryPolicy((first,) * some + (others,) * (count - some))
        return need(model, policy, rows, tokens, capacity, rates, host if waits else None)

    def fits(found: Need) -> bool:
        return found.total <= capacity and (host is None or found.host <= host)

    least = of(KEEP, count, KEEP)
    if fits(least):
        return least
    tiles = has_tiles(model, rows, tokens)
    for step in STEPS if count else ():
        enough = []
        for first, others in step:
            if first.tile:
                plain = of(replace(first, tile=0), count, KEEP)
                if not tiles or plain.total - (plain.step - plain.kept) > capacity:  # tiles keep as much
                    continue
            whole = of(first, count, others)
            least = min(least, whole, key=lambda each: each.total)
            if whole.total > capacity:
                continue
            low, high = 0, count  # fits on the GPU with `high`; on the host fewer take less
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if of(first, middle, others).total <= capacity else (middle + 1, high)
            if fits(found := of(first, high, others)):
                enough.append(found)
        if enough:
            return min(enough, key=lambda each: each.slowdown)
    if tiles:  # where even these do not fit, the steps leave them out
        least = min(least, of(tiled(LEAST), count, KEEP), key=lambda each: each.total)
    return least


def least_host(model: Model, policy: MemoryPolicy | None, rows: int, tokens: int, capacity: int, rates: Rates) -> int:
    """The least of the host's memory, a multiple of GRAIN, with which a policy (None: any) fits that has room on the
    GPU: it fits with all more, too."""

    def asked(host: int | None) -> Need:
        if policy is None:
            return choose(model, rows, tokens, capacity, host, rates)
        return need(model, policy, rows, tokens, capacity, rates, host)

    low, high = 0, -(-asked(None).host // GRAIN)
    while low < high:
        middle = (low + high) // 2
        found = asked(middle * GRAIN)
        fits = found.total <= capacity and found.host <= middle * GRAIN
        low, high = (low, middle) if fits else (middle + 1, high)
    return high * GRAIN
