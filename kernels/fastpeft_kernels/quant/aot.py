"""What to compile ahead of time: the decode and encode kernels as launched for weights of usual shapes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..common.aot import AotCase
    from .forward import DecodeConfig, EncodeConfig


def cases() -> Iterator[AotCase]:
    """Every configuration for bf16; the default one for all dtypes, strided results and unaligned rows too."""
    from .forward import DECODE_CONFIGS, ENCODE_CONFIGS

    for config, nested in product(DECODE_CONFIGS, (False, True)):
        yield _decode(config, "bf16", nested, default=config == DECODE_CONFIGS[0])
    for dtype in ("fp16", "fp32"):
        yield _decode(DECODE_CONFIGS[0], dtype, nested=True)
    yield _decode(DECODE_CONFIGS[0], "bf16", nested=True, one_run=False)
    yield _decode(DECODE_CONFIGS[0], "bf16", nested=True, one_run=False, aligned=False)
    yield _decode(DECODE_CONFIGS[0], "bf16", nested=True, aligned=False, words=False)
    for encoding, blocksize in product(ENCODE_CONFIGS, (64, 4096)):
        yield _encode(encoding, "bf16", blocksize, tail=False, default=encoding == ENCODE_CONFIGS[0])
    for dtype, tail in product(("fp16", "fp32"), (False, True)):
        yield _encode(ENCODE_CONFIGS[0], dtype, 64, tail)


def _decode(
    config: DecodeConfig,
    dtype: str,
    nested: bool,
    default: bool = True,
    one_run: bool = True,
    aligned: bool = True,
    words: bool = True,
) -> AotCase:
    from ..common.aot import AotCase
    from .forward import decode_4bit_kernel

    # In the usual case every count is a multiple of 16, which is what lets loads and stores take 16 bytes.
    integer = "i32:16" if aligned else "i32"
    signature = {
        "packed_ptr": "*i32" if words else "*u8:1",
        "absmax_ptr": "*u8" if nested else "*fp32",
        "code_ptr": "*fp32",
        "out_ptr": f"*{dtype}",
        "total_bytes": integer,
        "first": integer,
        "length": integer,
        "words": integer,
        "stride_run": integer,
    }
    constexprs: dict[str, Any] = {
        "stride": 1,
        "BLOCKSIZE": 64,
        "NESTED_BLOCKSIZE": 256 if nested else 0,
        "ONE_RUN": one_run,
        "ALIGNED": aligned,
        "SHARED_TABLE": config.shared_table,
        "BLOCK_WORDS": config.block_words,
    }
    for name in ("nested_absmax_ptr", "nested_code_ptr", "nested_offset_ptr"):
        if nested:
            signature[name] = "*fp32"
        else:
            constexprs[name] = None
    parts = ("decode", dtype, f"{config.block_words}x{config.num_warps}")
    flags = {
        "l1": not config.shared_table,
        "nested": nested,
        "strided": not one_run,
        "unaligned": not aligned,
        "bytes": not words,
    }
    name = "_".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])
    return AotCase(name, decode_4bit_kernel, signature, constexprs, num_warps=config.num_warps, default=default)


def _encode(config: EncodeConfig, dtype: str, blocksize: int, tail: bool, default: bool = True) -> AotCase:
    from ..common.aot import AotCase
    from .forward import encode_4bit_kernel

    signature = {
        "weight_ptr": f"*{dtype}",
        "thresholds_ptr": "*fp32",
        "nibbles_ptr": "*u8",
        "packed_ptr": "*u8",
        "absmax_ptr": "*fp32",
        "elements": "i32" if tail else "i32:16",
        "blocks": "i32",
    }
    constexprs = {"BLOCKSIZE": blocksize, "TAIL": tail, "BLOCKS": max(1, config.tile // blocksize)}
    name = f"encode_{dtype}_{blocksize}_{config.tile}x{config.num_warps}{'_tail' if tail else ''}"
    return AotCase(name, encode_4bit_kernel, signature, constexprs, num_warps=config.num_warps, default=default)
