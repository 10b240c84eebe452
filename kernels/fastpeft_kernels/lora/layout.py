"""A group of projections as flat tensors, numbers and one line of JSON, as a custom op can take it.

`flatten_group` is written so that torch.compile can trace it: no json module, no dataclass introspection; numbers stand
apart because the compiler may make them symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.traced_json import parsed, to_json
from ..weights import unflatten_weight
from .projection import Dtypes, Group, LoraAdapter, LoraProjection


@dataclass(frozen=True, eq=False, slots=True)
class FlatGroup:
    """What an op's tensors and layout say.

    Attributes:
        group: over those tensors.
        tracked: for each projection, parallel to `LoraProjection.tensors()`, the place among the tensors, or None.
    """

    group: Group
    tracked: list[list[int | None]]

    def flags(self, by_place: Sequence[bool]) -> list[list[bool]]:
        """What is said of each tensor's place, parallel to `tracked`; False where there is none."""
        return [[place is not None and by_place[place] for place in places] for places in self.tracked]


def flatten_group(group: Group) -> tuple[list[Tensor], list[float], str]:
    """(tensors, numbers, layout) from which `unflatten_group` makes the group again."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    parts: list[str] = []
    for projection, seed in zip(group.projections, group.seeds, strict=True):
        stored, meta = projection.weight.flatten()
        tensors.extend(stored)
        for tensor in (seed, projection.bias, projection.magnitude):
            if tensor is not None:
                tensors.append(tensor)
        adapters = []
        for adapter in projection.adapters:
            tensors.extend((adapter.a, adapter.b))
            if adapter.bias is not None:
                tensors.append(adapter.bias)
            if isinstance(adapter.scaling, Tensor):
                tensors.append(adapter.scaling)
            else:
                numbers.append(adapter.scaling)
            numbers.extend((adapter.dropout, adapter.index))
            adapters.append({"bias": adapter.bias is not None, "tensor_scaling": isinstance(adapter.scaling, Tensor)})
        described = {
            "kind": projection.weight.kind,
            "stored": len(stored),
            "meta": meta,
            "seed": seed is not None,
            "bias": projection.bias is not None,
            "magnitude": projection.magnitude is not None,
            "adapters": adapters,
        }
        parts.append(to_json(described))
    dtypes = group.dtypes
    names = [str(dtype).removeprefix("torch.") for dtype in (dtypes.compute, dtypes.lora, dtypes.out)]
    index = group.adapter_index
    numbers.extend(index or ())
    rows = to_json(None if index is None else len(index))
    head = f'"backend": {to_json(group.backend)}, "dtypes": {to_json(names)}, "rows": {rows}'
    return tensors, numbers, f'{{{head}, "projections": [{", ".join(parts)}]}}'


def unflatten_group(tensors: Sequence[Tensor], numbers: Sequence[float], layout: str) -> FlatGroup:
    """The group of `flatten_group`, over the same tensors, in the dtypes that their device is fast in."""
    described = parsed(layout)
    number = iter(numbers)
    place = 0

    def take(wanted: bool = True) -> int | None:
        nonlocal place
        place += wanted
        return place - 1 if wanted else None

    def at(index: int | None) -> Tensor | None:
        return None if index is None else tensors[index]

    dtypes = Dtypes(*(getattr(torch, name) for name in described["dtypes"])).on(tensors[0].device)
    projections: list[LoraProjection] = []
    seeds: list[Tensor | None] = []
    all_tracked: list[list[int | None]] = []
    for part in described["projections"]:
        stored = tuple(tensors[place : place + part["stored"]])
        place += part["stored"]
        weight = unflatten_weight(part["kind"], stored, part["meta"])
        seeds.append(at(take(part["seed"])))
        tracked, magnitude = [take(part["bias"])], take(part["magnitude"])
        adapters = []
        for fields in part["adapters"]:
            tracked += (take(), take(), take(fields["bias"]))
            a, b, bias = (at(index) for index in tracked[-3:])
            scaling = at(take()) if fields["tensor_scaling"] else next(number)
            adapters.append(LoraAdapter(a, b, scaling, bias, next(number), int(next(number))))  # type: ignore[arg-type]
        projections.append(LoraProjection(weight, at(tracked[0]), tuple(adapters), at(magnitude)))
        all_tracked.append([*tracked, magnitude])
    rows = described["rows"]
    adapter_index = None if rows is None else tuple([int(next(number)) for _ in range(rows)])
    return FlatGroup(Group(projections, dtypes, seeds, described["backend"], adapter_index), all_tracked)
