"""On Hopper no wgmma of a LoRA kernel takes an operand from registers, which ptxas before 13.3 miscompiles."""
# ruff: noqa: E402 (imports come after the reasons to skip the file)

from __future__ import annotations

import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl

from fastpeft_kernels.common import aot
from fastpeft_kernels.common.aot import AotCase
from fastpeft_kernels.common.triton_random import kept, row_keys
from fastpeft_kernels.lora.aot import cases

pytestmark = pytest.mark.aot
# The accumulator's registers end with "}"; a second list of registers after it is the first operand.
FROM_REGISTERS = re.compile(r"wgmma\.mma_async[^;]*?\},\s*\{")
DEFAULT = [case for case in cases() if case.default]


def ptx(case: AotCase) -> str:
    return str(aot._compile(aot._source(case, 90), case, 90).asm["ptx"])


@triton.jit
def _natural_order_kernel(x_ptr, a_ptr, s_ptr, seed_ptr, K, M: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """S = dropout(X) A^T as one would write it first."""
    m, r, k = tl.arange(0, M), tl.arange(0, R), tl.arange(0, BLOCK)
    first, second = row_keys(seed_ptr, m.to(tl.int64), tl.program_id(0))
    acc = tl.zeros((M, R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK):
        x = tl.load(x_ptr + m[:, None] * K + k[None, :] + k0)
        x = tl.where(kept(first[:, None], second[:, None], (k + k0)[None, :], 0), x, 0.0)
        acc = tl.dot(x, tl.load(a_ptr + r[None, :] * K + k[:, None] + k0), acc)
    tl.store(s_ptr + m[:, None] * R + r[None, :], acc)


def test_the_natural_order_has_the_risky_operand() -> None:
    tensors = {"x_ptr": "*bf16", "a_ptr": "*bf16", "s_ptr": "*fp32", "seed_ptr": "*i64", "K": "i32:16"}
    control = AotCase("control", _natural_order_kernel, tensors, {"M": 64, "R": 16, "BLOCK": 64})
    assert FROM_REGISTERS.search(ptx(control))


@pytest.mark.full
@pytest.mark.parametrize("case", DEFAULT, ids=lambda case: case.name)
def test_none_of_ours_has(case: AotCase) -> None:
    assert not FROM_REGISTERS.search(ptx(case))


def test_dropout_feeds_shared_memory_or_the_synchronous_mma() -> None:
    for rank, wgmma in ((16, False), (64, True)):
        text = ptx(next(case for case in DEFAULT if case.name.startswith(f"down_bf16_r{rank}_dropout")))
        assert ("wgmma.mma_async" in text) == wgmma and not FROM_REGISTERS.search(text)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in cases() if "linear_tma" in case.name], ids=lambda case: case.name)
def test_the_large_product_waits_for_the_one_before_the_last(case: AotCase) -> None:
    """In its loop; no product is in flight only when a tile is stored. S and X arrive by the same loads."""
    compiled = aot._compile(aot._source(case, 90), case, 90)
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", str(compiled.asm["ptx"]))
    assert waits[0] == "1" and set(waits[1:]) == {"0"}
    x, w, *_, s, b, _ = compiled.metadata.tensordesc_meta  # what Triton makes the descriptors of
    assert x == s and (w == b) == ("mixed" not in case.name)


def test_case_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
