"""The fused kernels, compiled for a Hopper GPU that is not here."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("what", "tensors", "stores"), (("fwd", 2, 1), ("bwd", 3, 2)))
def test_each_element_is_loaded_and_computed_once(what: str, tensors: int, stores: int) -> None:
    """Triton would move the products' layouts up to the loads, and compute the activation in each of them."""
    pytest.importorskip("triton")
    from fastpeft_kernels.common import aot
    from fastpeft_kernels.mlp.aot import cases
    from fastpeft_kernels.mlp.fused_backward import CONFIGS as BACKWARD
    from fastpeft_kernels.mlp.fused_forward import CONFIGS as FORWARD

    config = (FORWARD if what == "fwd" else BACKWARD)[0]
    case = next(case for case in cases() if case.name.startswith(f"{what}_silu_bf16"))
    ptx = aot._compile(aot._source(case, 90), case, 90).asm["ptx"]
    each = config.block_m * config.block_n // (32 * config.num_warps)
    assert ptx.count("ex2.approx") == each
    assert ptx.count("ld.global.v4.b32") >= 2 * tensors * each // 8, "before the loop and in it, 16 bytes each"
    assert ptx.count("st.global.v4.b32") >= stores * each // 8
    assert "st.global.b16" not in ptx, "a scalar store"
