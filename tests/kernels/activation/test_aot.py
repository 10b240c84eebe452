"""The kernels, compiled for a Hopper GPU that is not here."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.aot


def test_loads_and_stores_take_16_bytes() -> None:
    pytest.importorskip("triton")
    from fastpeft_kernels.activation.aot import cases
    from fastpeft_kernels.common import aot

    by_name = {case.name: case for case in cases()}
    for name, loads, stores in (("fwd_silu_bf16_1x1024x4", 2, 1), ("bwd_silu_bf16_1x1024x4", 3, 3)):
        ptx = aot._compile(aot._source(by_name[name], 90), by_name[name], 90).asm["ptx"]
        assert (ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32")) == (loads, stores)
        assert "st.global.b16" not in ptx, "a scalar store"
