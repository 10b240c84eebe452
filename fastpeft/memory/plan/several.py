"""What a training spread over several GPUs sends in each step, and how its speed grows; computed, nothing is measured.

A collective over n GPUs is counted as a ring of links: of B bytes an all-gather and a reduce-scatter move (n - 1)/n B
through each GPU in n - 1 steps, an all-reduce twice as much in twice as many. DDP reduces a bucket at a time, FSDP2
each group by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from ..policy import LayerPolicy
from .timing import Rates, seconds

if TYPE_CHECKING:
    from .predicting import Model

WAYS = ("ddp", "fsdp2", "hybrid")
MOST_GPUS = 1 << 16
BUCKET, FIRST_BUCKET = 25 << 20, 1 << 20
"""Bytes of gradients that DDP reduces at a time, and of those that it begins with: its defaults."""


@dataclass(frozen=True)
class Fabric:
    """How GPUs are linked.

    Attributes:
        per_node: GPUs of a machine.
        link: bytes a second that a GPU sends to others of its machine, while it receives as many. The default is an
            H100's NVLink.
        network: the same between machines, for each GPU. The default is 400 Gb/s.
        latency: seconds of one step of a ring.
    """

    per_node: int = 8
    link: float = 450e9
    network: float = 50e9
    latency: float = 10e-6


@dataclass(frozen=True)
class Shares:
    """Bytes of a model by how they are spread.

    Attributes:
        layers: of the parameters of each layer, which is a group of its own.
        rest: of all other parameters, one more group.
        trained: of these those with gradients.
        trained_groups: groups with some of them.
        whole: what every process keeps all of, however it is spread: scales of 4-bit weights, and buffers.
    """

    layers: tuple[int, ...]
    rest: int
    trained: int
    trained_groups: int
    whole: int


@dataclass(frozen=True)
class Spread:
    """One step on so many GPUs.

    Attributes:
        way: "ddp" keeps the model on each GPU; "fsdp2" shards it over all, "hybrid" over those of a machine.
        base: bytes of parameters, scales and buffers that each GPU keeps.
        inside, across: bytes that each GPU sends in a step, within its machine and to others.
        seconds: that sending takes, computing aside.
        computing: seconds of a step on one GPU.
    """

    way: str
    gpus: int
    base: int
    inside: float
    across: float
    seconds: float
    computing: float

    @property
    def efficiency(self) -> tuple[float, float]:
        """Of speed over that of one GPU times `gpus`: where nothing is sent while computing, and where all is."""
        return (
            self.computing / (self.computing + self.seconds),
            self.computing / max(self.computing, self.seconds),
        )

    def to_dict(self) -> dict[str, Any]:
        """Of numbers and strings alone; sizes in bytes."""
        return asdict(self) | {"efficiency": list(self.efficiency)}


def shares_of(model: Model) -> Shares:
    """Of a model that `planning.model_of` made."""
    skeleton = model.skeleton
    traced = [list(skeleton.model.get_submodule(path).parameters()) for path in skeleton.layers]
    inside = {id(each) for layer in traced for each in layer}
    rest = [each for each in skeleton.model.parameters() if id(each) not in inside]
    every = [*(traced[index] for index in skeleton.order), rest]
    sizes = [sum(each.numel() * each.element_size() for each in group) for group in every]
    trained = [sum(p.numel() * p.element_size() for p in group if p.requires_grad) for group in every]
    held = sum(model.bytes[kind] for kind in ("packed", "dense", "trained", "buffer"))
    return Shares(tuple(sizes[:-1]), sizes[-1], sum(trained), sum(map(bool, trained)), max(0, held - sum(sizes)))


def spread(shares: Shares, way: str, gpus: int, computing: float, fabric: Fabric) -> Spread:
    """One step of one forward and one backward pass in each process.

    Args:
        way: one of WAYS. Of "fsdp2" layers are gathered in forward and again in backward, the rest once.
        gpus: at most those of a machine, or whole machines.
        computing: seconds of a step on one GPU.

    Raises:
        ValueError: an argument is none of these.
    """
    per_node = fabric.per_node
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    if not 1 <= gpus <= MOST_GPUS or (gpus > per_node and gpus % per_node):
        raise ValueError(f"gpus: expected at most {per_node} or a multiple of it up to {MOST_GPUS}, got {gpus}")
    parameters = sum(shares.layers) + shares.rest
    shards = {"ddp": 1, "fsdp2": gpus, "hybrid": min(gpus, per_node)}[way]
    copies = gpus // shards
    part, other = (shards - 1) / shards, (copies - 1) / copies
    sharding = part * ((2 * sum(shares.layers) + shares.rest) + shares.trained) if shards > 1 else 0.0
    reducing = 2 * other * shares.trained / shards
    collectives = 2 * len(shares.layers) + bool(shares.rest) + shares.trained_groups
    buckets = 1 + ceil(max(0, shares.trained - FIRST_BUCKET) / BUCKET)
    reductions = buckets if way == "ddp" else shares.trained_groups
    steps = collectives * (shards - 1) + 2 * reductions * (copies - 1)
    far_shards, far_copies = shards > per_node, shards * copies > per_node and copies > 1
    across = sharding * far_shards + reducing * far_copies
    inside = sharding + reducing - across
    return Spread(
        way, gpus, parameters // shards + shares.whole, inside, across,
        inside / fabric.link + across / fabric.network + steps * fabric.latency, computing,
    )  # fmt: skip


def scaling(
    model: Model, gpus: Iterable[int], rates: Rates | None = None, fabric: Fabric | None = None, recompute: bool = True
) -> list[Spread]:
    """Every way for each number of GPUs, each with the model's own rows and tokens.

    Args:
        recompute: the layers, as most trainings of many GPUs do, rather than keep all.
    """
    setting = model.setting
    policy = LayerPolicy("recompute" if recompute else "keep")
    layers = (policy,) * len(model.skeleton.order)
    computing = seconds(model, layers, setting.rows, setting.tokens, rates or Rates())
    shares = shares_of(model)
    return [spread(shares, way, count, computing, fabric or Fabric()) for count in gpus for way in WAYS]


def render(spreads: Iterable[Spread]) -> str:
    """A line for each."""
    columns = (f"{name:>13}" for name in ("base a GPU", "sent inside", "sent across", "sending"))
    lines = [f"{'GPUs':>6}  {'way':7}{''.join(columns)}{'efficiency':>15}"]
    for each in spreads:
        low, high = each.efficiency
        sizes = f"{each.base / 2**30:>9.2f} GiB{each.inside / 2**20:>9.1f} MiB{each.across / 2**20:>9.1f} MiB"
        lines.append(
            f"{each.gpus:>6}  {each.way:7}{sizes}{1e3 * each.seconds:>10.1f} ms{f'{low:.0%} to {high:.0%}':>15}"
        )
    return "\n".join(lines)
