"""The protocol of frozen weights, on dense ones."""

import copy
import json

import pytest
import torch

from fastpeft_kernels.weights import DenseWeight, FrozenWeight, unflatten_weight


def test_decode_rows_out_and_dtype():
    values = torch.randn(6, 4)
    weight = DenseWeight(values)
    assert weight.decode().data_ptr() == values.data_ptr()
    assert torch.equal(weight.decode(rows=(1, 3)), values[1:3])
    assert torch.equal(weight.decode(dtype=torch.float16), values.half())
    out = torch.full((2, 4), float("nan"), dtype=torch.bfloat16)
    assert weight.decode(out=out, rows=(4, 6)) is out
    assert torch.equal(out, values[4:].bfloat16())


def test_flatten_passes_through_json():
    weight = DenseWeight(torch.randn(6, 4))
    tensors, meta = weight.flatten()
    again = unflatten_weight(weight.kind, tensors, json.loads(json.dumps(meta)))
    assert torch.equal(again.decode(), weight.decode())
    assert again.decode().data_ptr() == weight.decode().data_ptr()


def test_stamp_sees_writes_and_moves_but_not_storage_freed_and_filled_again():
    values = torch.randn(6, 4)
    weight = DenseWeight(values)
    stamp = weight.stamp()
    weight.check_unchanged(stamp)
    kept, size = values.clone(), values.untyped_storage().nbytes()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(values):
        values.untyped_storage().resize_(0)
        values.untyped_storage().resize_(size)
        values.copy_(kept)
    weight.check_unchanged(stamp)
    values.data = values.double()
    with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
        weight.check_unchanged(stamp)
    stamp = weight.stamp()
    values.mul_(2)
    with pytest.raises(RuntimeError):
        weight.check_unchanged(stamp)


def test_copy_is_apart():
    weight = DenseWeight(torch.randn(6, 4))
    other = copy.deepcopy(weight)
    other.weight.zero_()
    assert weight.decode().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": (2, 7)}, r"rows: expected 0 <= first <= last <= 6, got \(2, 7\)"),
        ({"rows": (3, 2)}, "rows: expected"),
        ({"out": torch.empty(5, 4)}, r"out: expected shape \(6, 4\), got \(5, 4\)"),
        ({"out": torch.empty(6, 4, device="meta")}, "out: expected a tensor on cpu, got meta"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseWeight(torch.randn(6, 4)).decode(**arguments)


def test_unknown_kind_and_a_kind_taken_twice():
    with pytest.raises(ValueError, match=r"kind: expected one of .*'dense'.*, got 'brick'"):
        unflatten_weight("brick", (), {})
    with pytest.raises(TypeError, match="kind 'dense' is taken by DenseWeight"):
        type("Other", (FrozenWeight,), {"kind": "dense"})
