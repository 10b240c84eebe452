"""FourBitWeight: the FrozenWeight protocol over 4-bit storage."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from fastpeft_kernels.quant import Packed4bit, decode_4bit, encode_4bit
from fastpeft_kernels.weights import FourBitWeight, unflatten_weight

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.fixture(params=(False, True), ids=("plain", "nested"))
def packed(request: pytest.FixtureRequest) -> Packed4bit:
    return encode_4bit(torch.randn(12, 70, dtype=torch.bfloat16), "fp4", 32, nested=request.param)


def test_describes_the_storage(packed: Packed4bit) -> None:
    weight = FourBitWeight(packed)
    assert (weight.kind, weight.shape, weight.dtype) == ("four_bit", (12, 70), torch.bfloat16)
    assert weight.device == torch.device("cpu")
    assert weight.linear(torch.ones(1, 70)) is None and weight.linear_t(torch.ones(1, 12)) is None


def test_decodes(packed: Packed4bit) -> None:
    weight = FourBitWeight(packed)
    whole = weight.decode()
    assert whole.dtype == torch.bfloat16 and torch.equal(whole, decode_4bit(packed))
    assert torch.equal(weight.decode(rows=(3, 8)), whole[3:8])
    assert weight.decode(dtype=torch.float32).dtype == torch.float32
    out = torch.empty(70, 5).t()
    assert weight.decode(out, (3, 8), torch.bfloat16) is out
    assert torch.equal(out, weight.decode(rows=(3, 8), dtype=torch.float32))


def test_says_what_is_wrong(packed: Packed4bit) -> None:
    with pytest.raises(TypeError, match=r"packed: expected a Packed4bit, got Tensor"):
        FourBitWeight(packed.packed)  # type: ignore[arg-type]
    weight = FourBitWeight(packed)
    with pytest.raises(ValueError, match=r"rows: expected 0 <= first <= last <= 12, got \(0, 13\)"):
        weight.decode(rows=(0, 13))
    with pytest.raises(ValueError, match=r"out: expected shape \(12, 70\), got \(70, 12\)"):
        weight.decode(torch.empty(70, 12))
    tensors, meta = weight.flatten()
    with pytest.raises(ValueError, match=r"tensors: expected 3, or 6 when nested, got 2"):
        FourBitWeight.unflatten(tensors[:2], meta)


def test_goes_through_json_and_back(packed: Packed4bit) -> None:
    weight = FourBitWeight(packed)
    tensors, meta = weight.flatten()
    again = unflatten_weight("four_bit", tensors, json.loads(json.dumps(meta)))
    assert isinstance(again, FourBitWeight)
    assert (again.shape, again.dtype, again.packed.quant_type) == (weight.shape, weight.dtype, "fp4")
    assert again.stamp() == weight.stamp(), "unflatten has to share the storage"
    assert torch.equal(again.decode(), weight.decode())


def test_deepcopy_has_storage_of_its_own(packed: Packed4bit) -> None:
    weight = FourBitWeight(packed)
    twin = copy.deepcopy(weight)
    before = weight.decode()
    twin.packed.packed.zero_()
    assert torch.equal(weight.decode(), before) and not torch.equal(twin.decode(), before)


def test_a_write_to_any_tensor_shows_in_the_stamp(packed: Packed4bit) -> None:
    weight = FourBitWeight(packed)
    for tensor in packed.tensors:
        stamp = weight.stamp()
        weight.check_unchanged(stamp)
        tensor.zero_()
        assert weight.stamp() != stamp
        with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
            weight.check_unchanged(stamp)


def test_a_write_to_bitsandbytes_parameter_shows_in_the_stamp(bitsandbytes: Any) -> None:
    from bitsandbytes.nn import Params4bit

    parameter = Params4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=True).to("cpu")
    weight = FourBitWeight(bitsandbytes.storage(parameter, parameter.quant_state))
    assert torch.equal(weight.decode(), bitsandbytes.functional.dequantize_4bit(parameter, parameter.quant_state))
    assert type(weight.packed.packed) is torch.Tensor
    stamp = weight.stamp()
    with torch.no_grad():
        parameter.zero_()
    assert weight.stamp() != stamp
    stamp = weight.stamp()
    parameter.quant_state.absmax.zero_()
    assert weight.stamp() != stamp
