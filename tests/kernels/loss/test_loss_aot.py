"""The kernels of losses, compiled for a Hopper GPU that is not here."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.aot


def test_loads_and_stores_take_16_bytes() -> None:
    pytest.importorskip("triton")
    from fastpeft_kernels.common import aot
    from fastpeft_kernels.loss.aot import cases
    from fastpeft_kernels.loss.tiles import CONFIGS

    each = CONFIGS[0].block // (32 * CONFIGS[0].num_warps)  # elements of a thread
    by_name = {case.name: case for case in cases()}
    for what, reads, exponentials in (("written", 2, each), ("gradient", 1, each)):
        case = by_name[f"{what}_bf16_{CONFIGS[0].block}x{CONFIGS[0].num_warps}"]
        ptx = aot._compile(aot._source(case, 90), case, 90).asm["ptx"]
        assert ptx.count("ld.global.v4.b32") == reads * each // 8
        assert ptx.count("st.global.v4.b32") == each // 8
        assert "st.global.b16" not in ptx, "a scalar store"
        assert exponentials <= ptx.count("ex2.approx") <= exponentials + 2, "an element's is computed once"
