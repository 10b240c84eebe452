"""encode_4bit, decode_4bit and Packed4bit: results, arguments, backends, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fastpeft_kernels.quant import Packed4bit, decode_4bit, encode_4bit, reference
from tests.fresh import run_fresh

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.fixture(params=(False, True), ids=("plain", "nested"))
def packed(request: pytest.FixtureRequest) -> Packed4bit:
    """Rows that begin in the middle of bytes, words and blocks."""
    return encode_4bit(torch.randn(13, 75), nested=request.param)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_out_may_have_any_dtype_and_strides(packed: Packed4bit, dtype: torch.dtype) -> None:
    want = decode_4bit(packed, dtype=torch.float32).to(dtype)
    room = torch.full((40, 160), torch.nan, dtype=dtype)
    places = {
        "contiguous": torch.full((13, 75), torch.nan, dtype=dtype),
        "beside others": room[5:18, 3:78],
        "every other": room[:26:2, :150:2],
        "transposed": torch.full((75, 13), torch.nan, dtype=dtype).t(),
    }
    for name, out in places.items():
        assert decode_4bit(packed, out) is out
        assert torch.equal(out, want), name
    inside = torch.zeros_like(room, dtype=torch.bool)
    inside[5:18, 3:78] = True
    inside[:26:2, :150:2] = True
    assert room[~inside].isnan().all(), "wrote beside out"


def test_out_decides_the_dtype(packed: Packed4bit) -> None:
    out = torch.empty(13, 75, dtype=torch.float16)
    assert decode_4bit(packed, out, dtype=torch.float64).dtype == torch.float16


def test_rows_are_those_of_the_whole(packed: Packed4bit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode_4bit(packed)
    for chunk in (reference._CPU_CHUNK, 200, 1):
        monkeypatch.setattr(reference, "_CPU_CHUNK", chunk)
        for first, last in ((0, 13), (0, 1), (12, 13), (3, 9), (5, 5)):
            part = decode_4bit(packed, rows=(first, last))
            assert torch.equal(part, whole[first:last])
            out = torch.full((75, last - first), torch.nan).t()
            assert torch.equal(decode_4bit(packed, out, rows=(first, last)), part)


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)))
@pytest.mark.parametrize("nested", (False, True))
def test_empty_weights(shape: tuple[int, int], nested: bool) -> None:
    packed = encode_4bit(torch.empty(shape), nested=nested)
    assert packed.packed.numel() == packed.absmax.numel() == packed.blocks == 0
    assert not nested or packed.nested_offset.isfinite().all()
    assert decode_4bit(packed).shape == shape


def test_one_element() -> None:
    packed = encode_4bit(torch.tensor([[-2.5]]))
    assert packed.packed.tolist() == [0x07]  # -1, and the zero's nibble as filler
    assert decode_4bit(packed).tolist() == [[-2.5]]


def test_strides_and_gradients_of_the_weight_do_not_matter() -> None:
    weight = torch.randn(40, 33, requires_grad=True)
    before = weight.detach().clone()
    for form in (weight.t(), weight[::2, 1:]):
        assert torch.equal(encode_4bit(form).packed, encode_4bit(form.detach().contiguous()).packed)
    assert torch.equal(weight, before) and weight._version == 0


def test_autocast_changes_nothing(packed: Packed4bit) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = decode_4bit(packed)
    assert inside.dtype == torch.float32 and torch.equal(inside, decode_4bit(packed))


def test_storage_is_shared_and_copied(packed: Packed4bit) -> None:
    again = Packed4bit(**{field.name: getattr(packed, field.name) for field in fields(packed)})
    assert [t.data_ptr() for t in again.tensors] == [t.data_ptr() for t in packed.tensors]
    for duplicate in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(duplicate.tensors, packed.tensors, strict=True))
        assert torch.equal(decode_4bit(duplicate), decode_4bit(packed))


ENCODE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"weight": [[1.0]]}, TypeError, r"weight: expected a tensor in one of .*, got list"),
    "fp64": ({"weight": torch.ones(2, 2).double()}, TypeError, r"weight: .*float32.*, got torch.float64"),
    "vector": ({"weight": torch.ones(4)}, ValueError, r"weight: expected \(out_features, in_features\), got .*\(4,\)"),
    "quant_type": ({"quant_type": "int4"}, ValueError, r"quant_type: expected one of \('nf4', 'fp4'\), got 'int4'"),
    "sparse": ({"weight": torch.ones(2, 2).to_sparse()}, TypeError, r"weight: expected a dense tensor, got layout"),
    "blocksize no int": ({"blocksize": 64.0}, ValueError, r"blocksize: expected one of \(32, .*4096\), got 64.0"),
    "blocksize": ({"blocksize": 48}, ValueError, r"blocksize: expected one of \(32, .*4096\), got 48"),
    "backend": ({"backend": "cuda"}, ValueError, r"backend: expected one of .*'triton'\), got 'cuda'"),
}


@pytest.mark.parametrize("case", ENCODE_ERRORS)
def test_encode_says_what_is_wrong(case: str) -> None:
    wrong, error, message = ENCODE_ERRORS[case]
    with pytest.raises(error, match=message):
        encode_4bit(**{"weight": torch.ones(2, 2), **wrong})


DECODE_ERRORS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "no storage": (lambda: {"packed": torch.ones(2, 2)}, TypeError, r"packed: expected a Packed4bit, got Tensor"),
    "rows": (lambda: {"rows": (3, 14)}, ValueError, r"rows: expected 0 <= first <= last <= 13, got \(3, 14\)"),
    "rows backwards": (lambda: {"rows": (3, 2)}, ValueError, r"rows: expected .*, got \(3, 2\)"),
    "rows below": (lambda: {"rows": (-1, 2)}, ValueError, r"rows: expected .*, got \(-1, 2\)"),
    "rows of floats": (lambda: {"rows": (0.5, 2)}, TypeError, r"rows: expected two integers .*, got \(0.5, 2\)"),
    "one row": (lambda: {"rows": 3}, TypeError, r"rows: expected two integers \(first, last\), got 3"),
    "dtype": (lambda: {"dtype": torch.int8}, TypeError, r"dtype: expected one of .*, got torch.int8"),
    "out dtype": (lambda: {"out": torch.ones(13, 75).int()}, TypeError, r"out: expected a tensor in one of .*int32"),
    "out type": (lambda: {"out": [1.0]}, TypeError, r"out: expected a tensor in one of .*, got list"),
    "out shape": (lambda: {"out": torch.ones(75, 13)}, ValueError, r"out: expected shape \(13, 75\), got \(75, 13\)"),
    "out device": (
        lambda: {"out": torch.ones(13, 75, device="meta")},
        ValueError,
        r"out: expected a tensor on cpu, got meta",
    ),
    "out with gradient": (
        lambda: {"out": torch.ones(13, 75, requires_grad=True)},
        ValueError,
        r"out: expected a tensor that requires no gradient",
    ),
    "out expanded": (lambda: {"out": torch.ones(75).expand(13, 75)}, ValueError, r"out: .*expanded .*\(0, 1\)"),
    "backend": (lambda: {"backend": "cpu"}, ValueError, r"backend: expected one of .*, got 'cpu'"),
    "triton on CPU": (lambda: {"backend": "triton"}, ValueError, r"backend: expected CUDA tensors .*, got .* on cpu"),
}


@pytest.mark.parametrize("case", DECODE_ERRORS)
def test_decode_says_what_is_wrong(case: str, packed: Packed4bit) -> None:
    make, error, message = DECODE_ERRORS[case]
    if case == "triton on CPU":
        pytest.importorskip("triton")
    with pytest.raises(error, match=message):
        decode_4bit(**{"packed": packed, **make()})


STORAGE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "packed missing": ({"packed": None}, TypeError, r"packed: expected a tensor, got NoneType"),
    "packed short": (
        {"packed": torch.ones(487, dtype=torch.uint8)},
        ValueError,
        r"packed: expected 488 bytes .*got 487",
    ),
    "packed strided": (
        {"packed": torch.ones(976, dtype=torch.uint8)[::2]},
        ValueError,
        r"packed: expected a contiguous tensor, got strides \(2,\)",
    ),
    "absmax dtype": (
        {"absmax": torch.ones(16).bfloat16()},
        TypeError,
        r"absmax: expected .*uint8.*CPU inference layout",
    ),
    "absmax count": (
        {"absmax": torch.ones(15, dtype=torch.uint8)},
        ValueError,
        r"absmax: expected 16 elements, got shape \(15,\)",
    ),
    "code count": ({"code": torch.ones(256)}, ValueError, r"code: expected 16 elements, got shape \(256,\)"),
    "code device": ({"code": torch.ones(16, device="meta")}, ValueError, r"code: expected a tensor on cpu .*got meta"),
    "blocksize": ({"blocksize": 100}, ValueError, r"blocksize: expected one of .*, got 100"),
    "shape": ({"shape": (13, 75, 1)}, ValueError, r"shape: expected \(out_features, in_features\), got \(13, 75, 1\)"),
    "no shape": ({"shape": None}, ValueError, r"shape: expected \(out_features, in_features\), got None"),
    "another blocksize": ({"blocksize": 32}, ValueError, r"absmax: expected 31 elements, got shape \(16,\)"),
    "dtype": ({"dtype": torch.int8}, TypeError, r"dtype: expected one of .*, got torch.int8"),
    "quant_type": ({"quant_type": "af4"}, ValueError, r"quant_type: expected one of .*, got 'af4'"),
    "nested half": ({"nested_code": None}, ValueError, r"nested_code: expected a value, .*got None"),
    "nested_absmax": (
        {"nested_absmax": torch.ones(2)},
        ValueError,
        r"nested_absmax: expected 1 elements, got .*\(2,\)",
    ),
    "nested_offset": ({"nested_offset": torch.ones(()).double()}, TypeError, r"nested_offset: expected .*float32"),
    "nested_blocksize": ({"nested_blocksize": 100}, ValueError, r"nested_blocksize: expected a power of two, got 100"),
}


@pytest.mark.parametrize("case", STORAGE_ERRORS)
def test_storage_says_what_is_wrong(case: str) -> None:
    wrong, error, message = STORAGE_ERRORS[case]
    with pytest.raises(error, match=message):
        replace(encode_4bit(torch.ones(13, 75), nested=True), **wrong)


def test_compiles_without_graph_breaks(packed: Packed4bit) -> None:
    def decode(out: Tensor | None, rows: tuple[int, int] | None) -> Tensor:
        return decode_4bit(packed, out, rows) * 2

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for rows in (None, (2, 9)):
        want = decode_4bit(packed, rows=rows)
        assert torch.equal(compiled(None, rows), want * 2)
        room = torch.full((13, 90), torch.nan)
        out = room[: want.shape[0], 5:80]
        assert torch.equal(compiled(out, rows), want * 2)
        assert torch.equal(out, want), "out was not written in place"


def test_is_one_op_under_selective_checkpointing(packed: Packed4bit) -> None:
    seen = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(op.name())
        return CheckpointPolicy.PREFER_RECOMPUTE

    out = torch.empty(13, 75)
    caching, _ = create_selective_checkpoint_contexts(policy)
    with caching:
        result = decode_4bit(packed)
        decode_4bit(packed, out)
    assert seen == ["fastpeft::decode_4bit", "fastpeft::decode_4bit_out"]
    assert torch.equal(result, out)


def test_ops_keep_the_rules_of_torch_library(packed: Packed4bit) -> None:
    weight = (packed.tensors, packed.shape, packed.blocksize, packed.nested_blocksize or 0, packed.quant_type, 2, 9)
    torch.library.opcheck(torch.ops.fastpeft.decode_4bit.default, (*weight, torch.bfloat16, "torch"))
    torch.library.opcheck(torch.ops.fastpeft.decode_4bit_out.default, (*weight, torch.empty(7, 75), "torch"))


def test_asking_for_triton_without_it_is_an_error() -> None:
    code = """
import torch
from fastpeft_kernels.quant import decode_4bit, encode_4bit
packed = encode_4bit(torch.ones(3, 5), nested=True)
assert torch.equal(decode_4bit(packed), torch.ones(3, 5))
for call in (lambda: decode_4bit(packed, backend="triton"), lambda: encode_4bit(torch.ones(3, 5), backend="triton")):
    try:
        print(call())
    except ImportError as error:
        print(error)
"""
    assert (
        run_fresh(code, blocked=("triton", "bitsandbytes")).splitlines()
        == ["backend: 'triton' was asked for, but Triton is not installed"] * 2
    )
