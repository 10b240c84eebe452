"""What to compile ahead of time: plain causal attention in the default tiles, and one problem with everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from .tiles import Tile, Tiles

if TYPE_CHECKING:
    from ..common.aot import AotCase

_DESCRIBED, _ROOMY, _NARROW = (90, 100), (80,), (86, 89, 120)
_TYPES = {
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "seed_ptr": "*i64", "padding_ptr": "*u8", "dense_ptr": "*u8",
    "start_ptr": "*i32", "stop_ptr": "*i32", "ranges_ptr": "*i32", "sums_ptr": "*fp32",
    "scale": "fp32", "softcap": "fp32", "keep_scale": "fp32", "product_scale": "fp32",
}  # fmt: skip
_ABSENT = dict.fromkeys(
    ("left", "start_ptr", "stop_ptr", "padding_ptr", "dense_ptr", "softcap", "relative_ptr", "bias_ptr", "seed_ptr")
)


def cases() -> Iterator[AotCase]:
    """bf16 stands for fp16 too. Tiles are those of each kind of GPU."""
    import torch

    from .tiles import tiles_for

    for targets in (_DESCRIBED, _ROOMY, _NARROW):
        for features in (64, 128, 256):
            for i, tiles in enumerate(tiles_for(targets[0], torch.bfloat16, features, features)):
                yield from _plain(features, tiles, targets, default=i == 0)
    for features in (64, 128):
        for tiles in tiles_for(90, torch.bfloat16, features, features, added=1):
            yield from _added(features, tiles, _DESCRIBED, default=False)
    yield from _added(128, _undescribed(tiles_for(86, torch.bfloat16, 128, 128, added=1)[0]), _NARROW, default=False)
    yield from _everything(tiles_for(90, torch.bfloat16, 64, 64, added=2)[0])


def _plain(features: int, tiles: Tiles, targets: tuple[int, ...], default: bool) -> Iterator[AotCase]:
    from .backward_keys import attention_bwd_keys_kernel
    from .backward_queries import attention_bwd_queries_kernel
    from .forward import attention_fwd_kernel

    constants = {**_ABSENT, "PLAIN": True, "NATURAL": False, "LOWER": False}
    name = f"causal_bf16_{features}_sm{targets[0]}"
    yield _case(name, attention_fwd_kernel, {**constants, "sinks_ptr": None}, features, tiles.forward, targets, default)
    yield _case(name, attention_bwd_queries_kernel, constants, features, tiles.queries, targets, default)
    constants["ranges_ptr"] = None
    yield _case(name, attention_bwd_keys_kernel, constants, features, tiles.keys, targets, default)


def _undescribed(tiles: Tiles) -> Tiles:
    """As they are where nothing is read through descriptors."""
    return Tiles(*(replace(getattr(tiles, each.name), tma=False) for each in fields(tiles)))


def _added(features: int, tiles: Tiles, targets: tuple[int, ...], default: bool) -> Iterator[AotCase]:
    from .backward_keys import attention_bwd_keys_kernel
    from .backward_queries import attention_bwd_queries_kernel
    from .forward import attention_fwd_kernel

    part = "relative_ptr" if features == 64 else "softcap"
    constants: dict[str, Any] = {name: None for name in _ABSENT if name != part}
    constants |= {"PLAIN": False, "NATURAL": False, "LOWER": False}
    fwd = {**constants, "sinks_ptr": None}
    name = f"{part.removesuffix('_ptr')}_{features}"
    yield _case(name, attention_fwd_kernel, fwd, features, tiles.forward, targets, default)
    yield _case(name, attention_bwd_queries_kernel, constants, features, tiles.queries, targets, default)
    keys = {**constants, "ranges_ptr": None}
    yield _case(name, attention_bwd_keys_kernel, keys, features, tiles.keys, targets, default)


def _everything(tiles: Tiles) -> Iterator[AotCase]:
    from .backward import attention_bwd_rows_kernel
    from .backward_keys import attention_bwd_keys_kernel
    from .backward_queries import attention_bwd_queries_kernel
    from .backward_scores import attention_bwd_scores_kernel
    from .forward import attention_fwd_kernel

    constants = {"PLAIN": False, "NATURAL": False, "LOWER": True}
    yield _case("everything", attention_fwd_kernel, constants, 64, tiles.forward, _DESCRIBED, False)
    yield _case("everything", attention_bwd_queries_kernel, constants, 64, tiles.queries, _DESCRIBED, False)
    yield _case("everything", attention_bwd_keys_kernel, constants, 64, tiles.keys, _DESCRIBED, False)
    for relative in (True, False):
        kind = {"RELATIVE": relative, "SUM_ROWS": not relative, "SUM_COLUMNS": False}
        name = "relative" if relative else "bias"
        yield _case(name, attention_bwd_scores_kernel, {**constants, **kind}, 64, tiles.scores, _DESCRIBED, False)
    yield _case("rows", attention_bwd_rows_kernel, {"NATURAL": False}, 64, tiles.scores, _DESCRIBED, True, matrix=False)


def _case(
    name: str,
    kernel: Any,
    constants: dict[str, Any],
    features: int,
    tile: Tile,
    targets: tuple[int, ...],
    default: bool,
    matrix: bool = True,
) -> AotCase:
    """Strides are multiples of 8, in whose units they come."""
    from ..common.aot import AotCase, signature_of

    sizes = {"UNIT": 8, "FEATURES": features, "V_FEATURES": features, "BLOCK_D": features, "BLOCK_V": features}
    sizes |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK": tile.block_m}
    sizes |= {"TMA": tile.tma, "BIAS_COLUMN": 1, "BIAS_UNIT": 8, "DENSE_COLUMN": 1, "DENSE_UNIT": 8}
    pointers = {key: "*bf16" for key in kernel.arg_names if key.endswith("_ptr")}
    if tile.tma:
        rows = {"q_ptr": tile.block_m, "k_ptr": tile.block_n, "v_ptr": tile.block_n, "do_ptr": tile.block_m}
        described = {key: f"tensordesc<bf16[1,1,{block},{features}]>" for key, block in rows.items()}
        pointers |= {key: kind for key, kind in described.items() if key in pointers}
    constants = {**constants, **{key: size for key, size in sizes.items() if key in kernel.arg_names}}
    signature = signature_of(kernel, constants, {**pointers, **_TYPES}, "i32")
    label = f"{kernel.__name__.removeprefix('attention_').removesuffix('_kernel')}_{name}_{tile.label}"
    return AotCase(label, kernel, signature, constants, tile.num_warps, tile.num_stages, default, matrix, targets)
