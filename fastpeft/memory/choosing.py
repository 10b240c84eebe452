"""The fastest policy that fits, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .policy import LayerPolicy, MemoryPolicy
from .predicting import Model

CONTEXT = 512 << 20
"""Bytes of a process's CUDA context with its libraries' kernels; differs from GPU to GPU."""
RESERVE = 0.03
"""Of the GPU's memory, for the allocator's fragments."""


@dataclass(frozen=True)
class Rates:
    """What a time is told from.

    Attributes:
        flops: multiplications and additions a second that training reaches on the GPU.
        link: bytes a second from host to GPU.
    """

    flops: float = 60e12
    link: float = 20e9


@dataclass(frozen=True)
class Need:
    """Bytes of a training under a policy, and its time beside that of keeping all.

    Attributes:
        static: base, adapters, gradients and optimizer on the GPU.
        step: what a step takes at the most beside these.
        total: with context and fragments.
        host: in pinned memory.
        slowdown: time of a step over that with everything kept and resident, told from `Rates`.
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


def need(model: Model, policy: MemoryPolicy, rows: int, tokens: int, capacity: int, rates: Rates) -> Need:
    """Bytes and time under a policy."""
    count = len(model.skeleton.order)
    layers = policy.of(count)
    traced = tuple(
        [LayerPolicy() if each.activations == "keep" else LayerPolicy("recompute", tile=each.tile) for each in layers]
    )
    peak = model.peak(traced, rows, tokens)
    inputs = rows * tokens * _width(model) * model.setting.dtype.itemsize
    moved = sum(each.activations == "offload" for each in layers)
    offloaded = max(0, moved - 2) * inputs  # two are on their way
    streamed = [size for size, each in zip(model.layer_bytes, layers, strict=True) if each.streamed]
    ring = policy.ring * max(streamed, default=0)
    bytes_ = model.bytes
    static = sum(bytes_.values()) + model.gradients + model.optimizer - sum(streamed) + min(ring, sum(streamed))
    step = max(peak.size - offloaded, peak.loss)
    if model.setting.accumulated and model.setting.optimizer == "adamw_torch":
        step = max(step, bytes_["trained"])  # its temporaries, when all activations are gone
    total = static + step + CONTEXT + int(RESERVE * capacity)
    host = moved * inputs + sum(streamed)
    slowdown = _time(model, policy, rows, tokens, rates) / _time(model, MemoryPolicy(), rows, tokens, rates)
    return Need(policy, static, step, peak.when, peak.kept, peak.loss, peak.working, total, host, slowdown)


def policies(count: int) -> Iterator[Callable[[int], MemoryPolicy]]:
    """Families of policies, the fastest first; each takes how many layers, from the first on, take part."""

    def first(one: LayerPolicy, other: LayerPolicy) -> Callable[[int], MemoryPolicy]:
        return lambda some: MemoryPolicy((one,) * some + (other,) * (count - some))

    recompute, offload = LayerPolicy("recompute"), LayerPolicy("offload")
    yield first(recompute, LayerPolicy())
    yield first(offload, recompute)
    yield first(LayerPolicy("offload", streamed=True), offload)


def choose(model: Model, rows: int, tokens: int, capacity: int, host: int | None, rates: Rates) -> Need:
    """The cheapest policy in time that fits; where none does, the one that needs least."""
    count = len(model.skeleton.order)

    def of(policy: MemoryPolicy) -> Need:
        return need(model, policy, rows, tokens, capacity, rates)

    def fits(found: Need) -> bool:
        return found.total <= capacity and (host is None or found.host <= host)

    least = of(MemoryPolicy((LayerPolicy(),) * count))
    if fits(least):
        return least
    for family in policies(count):
        whole = of(family(count))
        least = min(least, whole, key=lambda each: each.total)
        if not fits(whole):
            continue
        low, high = 0, count  # fits with `high`
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(of(family(middle))) else (middle + 1, high)
        return of(family(high))
    return least


def _width(model: Model) -> int:
    config = model.setting.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", None) or text.d_model)


def _time(model: Model, policy: MemoryPolicy, rows: int, tokens: int, rates: Rates) -> float:
    """Seconds of a step: products of every layer, once more if recomputed, or the link where that is slower."""
    count = len(model.skeleton.order)
    total = 0.0
    inputs = rows * tokens * _width(model) * model.setting.dtype.itemsize
    for layer, traced, size in zip(policy.of(count), model.skeleton.order, model.layer_bytes, strict=True):
        forward = 2.0 * rows * tokens * _elements(model, traced) + 2.0 * rows * tokens**2 * _width(model)
        passes = {"keep": 2, "selective": 2.2, "recompute": 3, "offload": 3}[layer.activations]
        compute = passes * forward / rates.flops
        moved = 2 * inputs * (layer.activations == "offload") + 2 * size * layer.streamed
        total += max(compute, moved / rates.link)
    return total or 1.0


def _elements(model: Model, traced: int) -> int:
    """Weights that each token is multiplied by in a layer; of stacked experts those that it chooses."""
    layer = model.skeleton.model.get_submodule(model.skeleton.layers[traced])
    config = model.setting.config
    total = 0.0
    for module in layer.modules():
        if hasattr(module, "in_features") and not hasattr(module, "base_layer"):
            total += module.in_features * module.out_features
        total += sum(p.numel() for p in module._parameters.values() if p is not None and p.dim() == 3) * (
            getattr(config, "num_experts_per_tok", 1) / max(1, getattr(config, "num_experts", 1) or 1)
        )
    return int(total)
