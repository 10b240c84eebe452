"""The kernels, compiled for a Hopper GPU that is not here."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.aot


def test_loads_and_stores_take_16_bytes_and_nothing_spills() -> None:
    pytest.importorskip("triton")
    from fastpeft_kernels.common import aot
    from fastpeft_kernels.quant.aot import cases

    by_name = {case.name: case for case in cases()}
    for name in ("decode_bf16_256x2_l1", "decode_bf16_256x2_l1_nested", "decode_bf16_256x2_l1_nested_strided"):
        case = by_name[name]
        assert case.default
        result = aot.compile_case("quant", case, 90)
        assert not result.problems and result.registers <= 64
        ptx = aot._compile(aot._source(case, 90), case, 90).asm["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
        assert "st.global.b16" not in ptx, "a scalar store"
        assert ".ftz" not in ptx, "subnormal scales would be lost"


def test_case_names_are_unique() -> None:
    pytest.importorskip("triton")
    from fastpeft_kernels.quant.aot import cases

    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
