"""Checks that need a CUDA GPU: the whole MLP against fp64, in every layout, dtype and storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_verdicts import Verdicts
from ..lora.gpu_graph import change, check_replay
from ..lora.gpu_support import (
    BF16,
    CHOICES,
    DEVICE,
    F16,
    F32,
    F64,
    copied,
    dtype_name,
    make_projection,
    mixed_rows,
    moved,
    rand,
    reference_device,
    same_dtypes,
    with_numbers,
)
from ..lora.projection import Dtypes
from ..native.extension import group_extension
from ..tuning.choosing import forced
from . import apart, fused_gpu
from .api import draw_mlp_seeds, run_mlp
from .fused import FUSED
from .reference import lora_mlp_reference
from .structure import Mlp

LAYOUTS = {"gate and up": (1, 1), "both in one": (2,), "up alone": (1,)}
"""Sizes of the inner projections, in features."""
VARIANTS = (("dense", 0.0), ("nf4", 0.25), ("dense", 0.25), ("nf4", 0.0))
"""Storage of the base and dropout: all of them in bf16, the first two in others."""


def checks(shapes: tuple[tuple[int, int, int], ...] = ((512, 768, 1024), (333, 96, 200))) -> Iterator[Any]:
    """Named checks of (tokens, inputs, features). Each returns figures, or raises AssertionError."""
    for layout, base in product(LAYOUTS, ("dense", "nf4")):
        yield f"small mlp {layout} {base}", partial(_check_small, layout, base, shapes)
    yield from fused_gpu.checks()
    for layout in LAYOUTS:
        for dtypes in (same_dtypes(BF16), Dtypes(BF16, F32, BF16), same_dtypes(F16), same_dtypes(F32)):
            for base, p in VARIANTS if dtypes == same_dtypes(BF16) else VARIANTS[:2]:
                names = f"{layout} {'/'.join(map(dtype_name, (dtypes.compute, dtypes.lora)))} {base} {p=}"
                yield f"mlp {names}", partial(_check, layout, dtypes, base, p, shapes)
    for layout, (base, p) in zip(LAYOUTS, VARIANTS, strict=False):
        yield f"mixed mlp {layout} {base} {p=}", partial(_check, layout, same_dtypes(BF16), base, p, shapes, mixed=True)
    for base, p in VARIANTS:
        yield f"mlp in tiles {base} {p=}", partial(_check_tiles, base, p, shapes)
    yield "memory of an mlp in tiles", _check_memory_of_tiles
    for base in ("dense", "nf4"):
        yield f"CUDA graph of an MLP {base}", partial(_check_graph, base)


def _check(
    layout: str,
    dtypes: Dtypes,
    base: str,
    p: float,
    shapes: tuple[tuple[int, int, int], ...],
    mixed: bool = False,
) -> dict[str, Any]:
    """mixed: a row's adapter is the first, the second or none."""
    verdicts = Verdicts()
    for tokens, size, features in shapes:
        mlp = make_mlp(layout, size, features, 16, dtypes, base, p)
        lead = (8, tokens // 8) if mixed and tokens % 8 == 0 else (tokens,)
        if mixed:
            mlp = replace(mlp, adapter_index=mixed_rows(lead[0]))
        x, dy = (rand(*lead, size, dtype=dtypes.compute) for _ in range(2))
        seeds = draw_mlp_seeds(DEVICE, mlp, training=True)
        same = _reference(x, mlp, dtypes, seeds, dy, reference_device(dtypes))
        exact = _reference(x, mlp, same_dtypes(F64), seeds, dy, DEVICE, F64)
        for keep, choices in product((True, False), CHOICES):
            with forced({**CHOICES[choices], FUSED: "apart" if choices == "library" else "fused"}):
                ours, again = (derive(partial(run_mlp, keep=keep), x, mlp, dtypes, seeds, dy) for _ in range(2))
            for a, b in zip(ours, again, strict=True):
                verdicts.equal(b, a, "another result the second time")
            for i, triple in enumerate(zip(ours, same, exact, strict=True)):
                verdicts.within(*triple, f"result {i} of {tokens} tokens, {keep=}, {choices}")
    return {"share_of_budget": verdicts.settle()}


def _check_small(layout: str, base: str, shapes: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    """As three nodes, by C++ where it can be built."""
    built, verdicts = group_extension(wait=True) is not None, Verdicts()
    every = (same_dtypes(BF16), Dtypes(BF16, F32, BF16), same_dtypes(F32))
    for (tokens, size, features), dtypes in product(shapes, every):
        made = make_mlp(layout, size, features, 16, dtypes, base, 0.0)
        mlp = replace(made, inner=tuple(map(with_numbers, made.inner)), down=with_numbers(made.down))
        x, dy = (rand(tokens, size, dtype=dtypes.compute) for _ in range(2))
        seeds = [None] * len(mlp.projections)
        same = _reference(x, mlp, dtypes, seeds, dy, reference_device(dtypes))
        exact = _reference(x, mlp, same_dtypes(F64), seeds, dy, DEVICE, F64)
        with forced(CHOICES["library"]):
            assert apart.serves(x, mlp, dtypes, seeds), f"{tokens} tokens, {dtypes}"
            ours = derive(run_mlp, x, mlp, dtypes, seeds, dy)
        for i, triple in enumerate(zip(ours, same, exact, strict=True)):
            verdicts.within(*triple, f"result {i} of {tokens} tokens, {dtypes}")
    return {"share_of_budget": verdicts.settle(), "by": "C++" if built else "Python"}


def _reference(
    x: Tensor,
    mlp: Mlp,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dy: Tensor,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """What plain PyTorch gives on a device, in another dtype if one is given."""
    inner, down = tuple(copied(q, device, dtype) for q in mlp.inner), copied(mlp.down, device, dtype)
    there = [None if seed is None else seed.to(device) for seed in seeds]
    copy, (x, dy) = replace(mlp, inner=inner, down=down), (moved(t, device, dtype) for t in (x, dy))
    return [t.to(DEVICE) for t in derive(lora_mlp_reference, x, copy, dtypes, there, dy)]


def _check_tiles(base: str, p: float, shapes: tuple[tuple[int, int, int], ...]) -> dict[str, Any]:
    """Tiles of one token, of sizes that do and do not divide the tokens, and one of all."""
    verdicts = Verdicts()
    for layout, dtypes in product(LAYOUTS, (same_dtypes(BF16), Dtypes(BF16, F32, BF16))):
        tokens, size, features = shapes[0]
        mlp = make_mlp(layout, size, features, 16, dtypes, base, p)
        x, dy = (rand(tokens, size, dtype=dtypes.compute) for _ in range(2))
        seeds = draw_mlp_seeds(DEVICE, mlp, training=True)
        same = _reference(x, mlp, dtypes, seeds, dy, reference_device(dtypes))
        exact = _reference(x, mlp, same_dtypes(F64), seeds, dy, DEVICE, F64)
        for tile, choices in product((tokens // 4, tokens // 4 + 33, 2 * tokens), CHOICES):
            with forced({**CHOICES[choices], FUSED: "apart" if choices == "library" else "fused"}):
                ours = derive(partial(run_mlp, keep=False, tile=tile), x, mlp, dtypes, seeds, dy)
            for i, triple in enumerate(zip(ours, same, exact, strict=True)):
                verdicts.within(*triple, f"result {i} of {layout}, {tile=}, {choices}, {dtypes}")
    return {"share_of_budget": verdicts.settle()}


def _check_memory_of_tiles() -> dict[str, Any]:
    """Of the peak beside x, dy, the result and dx, and the three decoded weights, nothing grows with the tokens."""
    size, features, tile = 1024, 4096, 2048
    dtypes = same_dtypes(BF16)
    mlp = make_mlp("gate and up", size, features, 16, dtypes, "nf4", 0.0)
    figures = {}
    for tokens in (4 * tile, 16 * tile):
        x, dy = rand(tokens, size, dtype=BF16), rand(tokens, size, dtype=BF16)
        for name, options in (("whole", {"keep": False}), ("tiles", {"keep": False, "tile": tile})):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            derive(partial(run_mlp, **options), x, mlp, dtypes, [None] * 3, dy)
            figures[f"{name}_{tokens}_tokens_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    grown = figures[f"tiles_{16 * tile}_tokens_mib"] - figures[f"tiles_{4 * tile}_tokens_mib"]
    of_tokens = 2 * 12 * tile * size * 2 / 2**20  # the result and dx, in bf16
    assert grown <= 1.1 * of_tokens, f"{grown:.0f} MiB more for 12 tiles more, of which {of_tokens:.0f} are the results"
    return figures


def _check_graph(base: str) -> dict[str, Any]:
    dtypes = same_dtypes(BF16)
    mlp = make_mlp("gate and up", 768, 1024, 16, dtypes, base, 0.25)
    x, dy = rand(512, 768, dtype=BF16), rand(512, 768, dtype=BF16)
    seeds = draw_mlp_seeds(DEVICE, mlp, training=True)
    check_replay(lambda: derive(run_mlp, x, mlp, dtypes, seeds, dy), lambda: change(x, mlp.projections, seeds))
    return {}


def make_mlp(layout: str, size: int, features: int, rank: int, dtypes: Dtypes, base: str, p: float) -> Mlp:
    """p is that of the adapters' inputs and, over a dense base, of what down reads: then nothing is fused."""
    inner = [make_projection(size, n * features, (rank,), dtypes, base, p, bias=True) for n in LAYOUTS[layout]]
    down = (rank, 8) if p else (rank,)  # of one adapter without dropout the products are fused with the activation
    between = p if base == "dense" else 0.0
    return Mlp(tuple(inner), make_projection(features, size, down, dtypes, base, p), "silu", dropout=between)


def derive(run: Callable[..., Tensor], x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Any, dy: Tensor) -> list[Tensor]:
    """The output, dX and the parameters' gradients."""
    x = x.detach().requires_grad_()
    y = run(x, mlp, dtypes, seeds)
    parameters = [t for q in mlp.projections for t in q.tensors() if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *parameters], dy)]
