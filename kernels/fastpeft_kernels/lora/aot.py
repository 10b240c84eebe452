"""What `make aot` compiles: every LoRA kernel in its default configurations and in those to tune over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from ..common.aot import AotCase, signature_of
from ..common.triton_random import dropout_kernel
from . import backward, configs, dora_triton, forward, forward_tma, packing, partial_sums
from .configs import Config

_TENSOR_CORES = (80, 86, 89, 90, 100, 120)  # `backends.triton_refusal` keeps these kernels from older devices
_DESCRIPTORS = (90, 100)
_RANKS = ((16, False), (16, True), (64, True))  # with dropout or without
_BATCHES = (("", False), ("mixed_", True))
_INTEGERS = dict.fromkeys(("tokens", "stream", "threshold", "splits", "rows"), "i32")  # not specialised
_NUMBERS = dict.fromkeys(("scale", "factor", "factor0", "factor1", "factor2", "factor3"), "fp32")


def cases() -> Iterator[AotCase]:
    """bf16 stands for fp16 too. A name says kernel, dtypes, rank and variant."""
    for dtype in ("bf16", "fp32"):
        tensors = {"x_ptr": dtype, "out_ptr": dtype, "seed_ptr": "i64"}
        constants: dict[str, Any] = {"x_column_stride": 1, "out_column_stride": 1, "BLOCK_M": 4, "BLOCK_N": 1024}
        yield _case(f"dropout_{dtype}", dropout_kernel, tensors, constants, targets=None)
    yield from _down()
    yield from _linear()
    yield from _linear_tma()
    yield from _backward()
    for batch, mixed in _BATCHES:
        tensors, table = _table({"partial_ptr": "fp32", "out_ptr": "fp32"}, mixed, "starts_ptr")
        constants = {**table, "factor_ptr": None, "HAS_FACTOR_TENSOR": False, "BLOCK": 128}
        yield _case(f"{batch}sum", partial_sums.lora_sum_kernel, tensors, constants, targets=None)
    yield _pack()
    yield from _dora()


def _down() -> Iterator[AotCase]:
    for (rank, drops), (batch, mixed) in product(_RANKS, _BATCHES):
        for default, config in _tuned(configs.DOWN):
            tensors, table = _table(dict.fromkeys(("x_ptr", "a_ptr", "s_ptr"), "bf16"), mixed, "blocks_ptr")
            constants = {**table, "x_column_stride": 1, "a_column_stride": 1, "s_column_stride": 1, "EVEN_K": True}
            constants |= {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_R": config.ranks(rank)}
            name = f"{batch}down_bf16_r{rank}"
            yield _dropping(name, forward.lora_down_fwd_kernel, tensors, constants, drops, config, default)


def _linear() -> Iterator[AotCase]:
    """`forward` and `dx`: W as it is, and transposed with what was there before added."""
    for rank in (16, 64):
        for default, config in _tuned(configs.LINEAR):
            for dx in (False, True):
                tensors = dict.fromkeys(("x_ptr", "w_ptr", "s_ptr", "b_ptr", "bias_ptr", "y_ptr"), "bf16")
                constants: dict[str, Any] = {
                    "x_column_stride": 1,
                    "s_column_stride": 1,
                    "HAS_LORA": True,
                    "HAS_BIAS": not dx,
                }
                constants |= {"w_row_stride": 1, "b_row_stride": 1} if dx else {}
                constants |= {} if dx else {"w_column_stride": 1, "b_column_stride": 1}
                constants |= {"ACCUMULATE": dx, "EVEN_K": True, "GROUP_M": 8, **_blocks(config)}
                constants["BLOCK_R"] = config.ranks(rank)
                yield _case(
                    f"linear_bf16_r{rank}_{'dx' if dx else 'forward'}_{_label(config)}",
                    forward.lora_linear_fwd_kernel, tensors, constants, config, default, matrix=True,
                )  # fmt: skip


def _linear_tma() -> Iterator[AotCase]:
    """`forward` and `dx` as above; `mixed`: only B is transposed, as for a base that stores W^T; `wide`: dx in fp32;
    `three`: dx of three siblings."""
    for default, config in _tuned(configs.LINEAR_TMA):
        for variant in ("forward", "dx", "three", "wide", "mixed") if default else ("forward", "dx", "three", "wide"):
            dx, out = variant in ("dx", "three", "wide"), "fp32" if variant == "wide" else "bf16"
            turned = {"W_TRANSPOSED": dx, "B_TRANSPOSED": variant != "forward"}
            m, n, k = config.block_m, config.block_n, config.block_k
            blocks: dict[str, tuple[int, int]] = {"x_desc": (m, k), "s_desc": (m, k), "y_desc": (m, n // config.parts)}
            for name, transposed in zip(("w_desc", "b_desc"), turned.values(), strict=True):
                blocks[name] = (k, n) if transposed else (n, k)
            others = ("x2_desc", "w2_desc", "x3_desc", "w3_desc")
            if variant == "three":
                blocks |= {name: blocks[f"{name[0]}_desc"] for name in others}
            types = {
                name: f"tensordesc<{out if name == 'y_desc' else 'bf16'}[{rows},{columns}]>"
                for name, (rows, columns) in blocks.items()
            }
            types |= dict.fromkeys(
                ("out_features", "in_features", "in2_features", "in3_features", "rank", "group_m"), "i32"
            )  # not specialised
            constants: dict[str, Any] = {**turned, "HAS_LORA": True, "HAS_BIAS": not dx, "ACCUMULATE": dx}
            constants |= {"PAIRS": 3} if variant == "three" else {"PAIRS": 1, **dict.fromkeys(others)}
            constants |= _blocks(config)
            constants |= {"PARTS": config.parts, "PERSISTENT": config.persistent}
            staged = replace(config, num_stages=configs.tma_stages(config, 4 if out == "fp32" else 2))
            yield _case(
                f"linear_tma_bf16_{variant}_{config.label.replace(' ', '_')}",
                forward_tma.lora_linear_tma_fwd_kernel, {"bias_ptr": "bf16"}, constants, staged, default,
                matrix=True, targets=_DESCRIPTORS, types=types,
            )  # fmt: skip


def _backward() -> Iterator[AotCase]:
    for batch, mixed in _BATCHES:
        for default, config in _tuned(configs.UP):
            tensors = {"dy_ptr": "bf16", "b_ptr": "bf16", "s_ptr": "bf16", "ds_ptr": "fp32", "db_ptr": "fp32"}
            tensors, constants = _table(tensors, mixed, "blocks_ptr")
            constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": 16}
            name = f"{batch}up_bwd_{_label(config)}"
            yield _case(name, backward.lora_up_bwd_kernel, tensors, constants, config, default)
    for (rank, drops), (batch, mixed) in product(_RANKS, _BATCHES):
        for default, config in _tuned(configs.WEIGHT):
            tensors = {"x_ptr": "bf16", "ds_ptr": "bf16", "out_ptr": "fp32"}
            tensors, constants = _table(tensors, mixed, "blocks_ptr")
            constants |= {"out_feature_stride": 1, **_tile(config, rank)}
            name = f"{batch}down_bwd_weight_bf16_r{rank}"
            yield _dropping(name, backward.lora_down_bwd_weight_kernel, tensors, constants, drops, config, default)
        for default, config in _tuned(configs.INPUT):
            kernel = backward.lora_down_bwd_input_kernel
            for dx in ("bf16", "fp32"):
                tensors, table = _table({"ds_ptr": "bf16", "a_ptr": "bf16", "dx_ptr": dx}, mixed, "blocks_ptr")
                constants = {**table, "bias_ptr": None, "a_column_stride": 1, "ACCUMULATE": True}
                name = f"{batch}down_bwd_input_{dx}_r{rank}"
                constants |= _tile(config, rank)
                yield _dropping(name, kernel, tensors, constants, drops, config, default)
    yield from _mixed_update()


def _mixed_update() -> Iterator[AotCase]:
    """Y = S B^T + bias, of B as it is."""
    for rank in (16, 64):
        for default, config in _tuned(configs.INPUT):
            tensors = dict.fromkeys(("ds_ptr", "a_ptr", "dx_ptr", "bias_ptr"), "bf16")
            tensors, constants = _table(tensors, True, "blocks_ptr")
            constants |= {"a_row_stride": 1, "ACCUMULATE": False, **_tile(config, rank)}
            kernel, name = backward.lora_down_bwd_input_kernel, f"mixed_update_bf16_r{rank}"
            yield _dropping(name, kernel, tensors, constants, False, config, default)


def _table(tensors: dict[str, str], mixed: bool, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The tensors of a kernel and the constants, with the table of a mixed batch or None in its place."""
    return ({**tensors, name: "i32"}, {}) if mixed else (tensors, {name: None})


def _pack() -> AotCase:
    """Three fp32 adapters, one of them with its scaling on the device, to bf16."""
    tensors: dict[str, str] = {"down_ptr": "bf16", "scale1": "fp32"}
    for i in range(4):
        tensors |= {f"a{i}": "fp32", f"b{i}": "fp32", f"up{i}": "bf16"}
    constants = {"scale0": None, "scale2": None, "scale3": None, "COUNT": 3, "BLOCK": 1024}
    types = {f"{name}{i}": "i32" for name in ("rank", "features", "row", "stride") for i in range(4)}
    return _case("pack", packing.lora_pack_kernel, tensors, constants, targets=None, types=types)


def _dora() -> Iterator[AotCase]:
    """`wide`: fp32 adapters over a 16-bit base, and their z."""
    for variant, lora in (("bf16", "bf16"), ("wide", "fp32")):
        for rank in (16, 64):
            tensors = {"w_ptr": "bf16", "up_ptr": lora, "a_ptr": lora, "norms_ptr": "fp32"}
            constants, config = _settings(dora_triton.NORMS, BLOCK_R=dora_triton.norms_ranks(rank))
            yield _case(f"dora_norms_{variant}_r{rank}", dora_triton.dora_norms_kernel, tensors, constants, config)
        tensors = {"dy_ptr": "bf16", "z_ptr": lora, "gain_ptr": "fp32", "dz_ptr": "bf16", "sums_ptr": "fp32"}
        constants, config = _settings(dora_triton.GAIN, HAS_Z=True, HAS_DZ=True)
        kernel = dora_triton.dora_gain_bwd_kernel
        yield _case(f"dora_gain_bwd_{variant}", kernel, tensors, constants, config, targets=None)


def _settings(launch: dict[str, int], **constants: Any) -> tuple[dict[str, Any], Config]:
    """A launch's blocks with other constants, and its warps and stages."""
    blocks = {name: value for name, value in launch.items() if name.startswith("BLOCK")}
    return {**blocks, **constants}, Config(0, 0, 0, 0, launch["num_warps"], launch.get("num_stages", 3))


def _tuned(choices: Sequence[Config]) -> list[tuple[bool, Config]]:
    return [(i == 0, config) for i, config in enumerate(choices)]


def _label(config: Config) -> str:
    return "x".join(str(n) for n in (config.block_m, config.block_n, config.block_k) if n) + f"_{config.num_warps}w"


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def _tile(config: Config, rank: int) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_K": config.block_n, "BLOCK_R": config.ranks(rank)}


def _dropping(
    name: str,
    kernel: Any,
    tensors: dict[str, str],
    constants: dict[str, Any],
    drops: bool,
    config: Config,
    default: bool,
) -> AotCase:
    tensors = {**tensors, "seed_ptr": "i64"} if drops else tensors
    constants = {**constants, "HAS_DROPOUT": drops, **({} if drops else {"seed_ptr": None})}
    return _case(f"{name}{'_dropout' * drops}_{_label(config)}", kernel, tensors, constants, config, default)


def _case(
    name: str,
    kernel: Any,
    tensors: dict[str, str],
    constants: dict[str, Any],
    config: Config | None = None,
    default: bool = True,
    matrix: bool = False,
    targets: tuple[int, ...] | None = _TENSOR_CORES,
    types: dict[str, str] | None = None,
) -> AotCase:
    """Arguments that are not named are integers divisible by 16, as sizes and strides usually are."""
    config = config or Config(0, 0, 0, 0)
    given = {**_INTEGERS, **_NUMBERS, **{key: f"*{value}" for key, value in tensors.items()}, **(types or {})}
    signature = signature_of(kernel, constants, given, "i32:16")
    return AotCase(name, kernel, signature, constants, config.num_warps, config.num_stages, default, matrix, targets)
