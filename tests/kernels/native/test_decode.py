"""4-bit decoding in C++: the reference's bits for every layout, with vectors and without, on any number of threads."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastpeft_kernels.native import build, decode_4bit_native, native_library
from fastpeft_kernels.quant import Packed4bit, decode_4bit, encode_4bit
from fastpeft_kernels.quant.storage import BLOCKSIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 1 << 16  # elements, in decode.cpp

pytestmark = pytest.mark.usefixtures("nan_filled")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_paths = pytest.mark.parametrize("plain", (False, True), ids=("vectors", "plain"))


@pytest.fixture(autouse=True)
def library() -> None:
    if native_library() is None:
        pytest.skip("no C++ compiler here")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fails(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, ["c++"], stderr="c++: no such instruction")

    monkeypatch.setattr(build, "FLAGS", ("-something-else",))
    monkeypatch.setattr(build.subprocess, "run", fails)
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """NaN may have any bits."""
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.isnan(), want.isnan())
    same = (got.contiguous().view(bits) == want.contiguous().view(bits)) | want.isnan()
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


stored = given(
    rows=st.integers(0, 20),
    columns=st.one_of(st.integers(0, 200), st.sampled_from((256, 1024, 4096, 5000))),
    beside=st.integers(0, 3),
    quant_type=st.sampled_from(("nf4", "fp4")),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(1e-9, 1e6),
    plain=st.booleans(),
    data=st.data(),
)


@settings(max_examples=100)
@stored
def test_any_rows_of_any_shape_into_any_row_stride(**drawn: Any) -> None:
    check_rows(**drawn)


@pytest.mark.full
@settings(max_examples=400)
@stored
def test_many_rows_of_any_shape_into_any_row_stride(**drawn: Any) -> None:
    check_rows(**drawn)


def check_rows(
    rows: int,
    columns: int,
    beside: int,
    quant_type: str,
    blocksize: int,
    nested: bool,
    dtype: torch.dtype,
    scale: float,
    plain: bool,
    data: st.DataObject,
) -> None:
    packed = encode_4bit(torch.randn(rows, columns) * scale, quant_type, blocksize, nested)
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    room = torch.full((last - first + 1, columns + beside), torch.nan, dtype=dtype)
    out = room[: last - first, :columns]
    assert decode_4bit_native(packed, out, first, last, plain)
    assert_same_bits(out, decode_4bit(packed, rows=(first, last), dtype=dtype, backend="torch"))
    assert room[last - first :].isnan().all() and room[:, columns:].isnan().all(), "wrote beside out"


@every_dtype
@both_paths
def test_rounds_as_pytorch_does(dtype: torch.dtype, plain: bool) -> None:
    """Products that are ties, overflow, underflow, infinite and NaN: codes and scales of any bits."""
    bits = torch.randint(-(2**31), 2**31, (4000,), dtype=torch.int64).to(torch.int32)
    halves = torch.arange(-(2**15), 2**15, 37, dtype=torch.int32) << 16 | 0x8000  # between two of bf16
    near_half = torch.randint(0, 2**31, (4000,), dtype=torch.int64).to(torch.int32) % 0x14800000 + 0x33000000 - 0x800000
    ties_half = near_half & ~0xFFF  # among them those between two of fp16
    scales = torch.cat([bits, halves, near_half, ties_half]).view(torch.float32)
    scales[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    scales = scales[: scales.numel() // 2 * 2]
    code = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-130, 3.0, 1e30]), torch.randn(9)])
    packed = encode_4bit(torch.randn(scales.numel() // 2, 128), "nf4", 64)
    packed = replace(packed, absmax=scales.contiguous(), code=code)
    out = torch.empty(packed.shape, dtype=dtype)
    assert decode_4bit_native(packed, out, 0, packed.shape[0], plain)
    assert_same_bits(out, decode_4bit(packed, dtype=dtype, backend="torch"))


@both_paths
@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("columns", (999, 1024))
def test_many_pieces_on_any_number_of_threads(
    threads: Callable[[int], None], count: int, columns: int, plain: bool
) -> None:
    rows = 3 * PIECE // columns + 2
    packed = encode_4bit(torch.randn(rows, columns), nested=True)
    want = decode_4bit(packed, backend="torch")
    threads(count)
    for room in (torch.empty(rows, columns), torch.empty(rows, columns + 7)):
        out = room[:, :columns]
        assert decode_4bit_native(packed, out, 0, rows, plain)
        assert_same_bits(out, want)
    part = torch.empty(rows - 5, columns)
    assert decode_4bit_native(packed, part, 3, rows - 2, plain)
    assert_same_bits(part, want[3:-2])


def test_several_threads_may_decode_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    weights = [encode_4bit(torch.randn(300, 512), blocksize=size, nested=True) for size in BLOCKSIZES]
    wants = [decode_4bit(packed, backend="torch") for packed in weights]

    def decodes(index: int) -> bool:
        return torch.equal(decode_4bit(weights[index % 8], backend="native"), wants[index % 8])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(decodes, range(80)))


class Decoded(Dataset):
    def __init__(self, packed: Packed4bit) -> None:
        self.packed = packed

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return decode_4bit(self.packed, backend="native")


def test_workers_of_a_data_loader_may_decode(threads: Callable[[int], None]) -> None:
    threads(2)
    packed = encode_4bit(torch.randn(300, 512))
    want = decode_4bit(packed, backend="native")  # on two threads, which a forked child has lost
    loader = DataLoader(Decoded(packed), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(value, want) for value in loader)


@pytest.mark.parametrize("offset", (1, 2, 5))
def test_bytes_may_lie_anywhere(offset: int) -> None:
    packed = encode_4bit(torch.randn(9, 77), nested=True)
    room = torch.zeros(packed.packed.numel() + offset, dtype=torch.uint8)
    room[offset:] = packed.packed
    assert torch.equal(decode_4bit(replace(packed, packed=room[offset:])), decode_4bit(packed, backend="torch"))


def test_autograd_sees_the_write() -> None:
    packed, out = encode_4bit(torch.randn(4, 64)), torch.empty(4, 64)
    version = out._version
    decode_4bit(packed, out, backend="native")
    assert out._version > version
    with torch.inference_mode():
        assert torch.equal(decode_4bit(packed, torch.empty(4, 64), backend="native"), out)


def test_what_is_asked_for_explicitly_never_falls_back() -> None:
    packed = encode_4bit(torch.randn(4, 64))
    elsewhere = Packed4bit.from_tensors([t.to("meta") for t in packed.tensors], 64, (4, 64), torch.float32, "nf4", None)
    with pytest.raises(ValueError, match=r"backend: expected tensors on cpu for 'native', got tensors on meta"):
        decode_4bit(elsewhere, backend="native")
    with pytest.raises(ValueError, match=r"backend: expected a result in one of .* for 'native', got torch.float64"):
        decode_4bit(packed, dtype=torch.float64, backend="native")
    with pytest.raises(ValueError, match=r"backend: expected a result in one of .*, got torch.float64"):
        decode_4bit(packed, torch.empty(4, 64, dtype=torch.float64), backend="native")
    with pytest.raises(ValueError, match=r"backend: expected out with columns of stride 1 .* strides \(1, 4\)"):
        decode_4bit(packed, torch.empty(64, 4).t(), backend="native")
    with pytest.raises(ValueError, match=r"backend: expected one of \('auto', 'torch', 'triton'\), got 'native'"):
        encode_4bit(torch.randn(4, 64), backend="native")


def test_auto_leaves_the_rest_to_pytorch() -> None:
    packed = encode_4bit(torch.randn(5, 33), nested=True)
    want = decode_4bit(packed, backend="torch")
    assert torch.equal(decode_4bit(packed, torch.empty(33, 5).t()), want)
    assert torch.equal(decode_4bit(packed, dtype=torch.float64), want.double())


def test_without_a_compiler(no_library: None, caplog: pytest.LogCaptureFixture) -> None:
    packed = encode_4bit(torch.randn(5, 33), nested=True)
    assert torch.equal(decode_4bit(packed), decode_4bit(packed, backend="torch"))
    with pytest.raises(ImportError, match="'native' was asked for, but the C\\+\\+ library cannot be built here"):
        decode_4bit(packed, backend="native")
    assert len(caplog.records) == 1


def test_a_compiler_without_openmp_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(build, "THREADS", ("-fno-such-option",))
    native_library.cache_clear()
    try:
        assert native_library() is not None and len(list(tmp_path.rglob("*.so"))) == 1
    finally:
        native_library.cache_clear()


def test_traces_without_graph_breaks() -> None:
    packed = encode_4bit(torch.randn(13, 75), nested=True)
    compiled = torch.compile(lambda: decode_4bit(packed, backend="native") * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), decode_4bit(packed, backend="torch") * 2)


@every_dtype
def test_faster_than_pytorch(dtype: torch.dtype) -> None:
    packed, out = encode_4bit(torch.randn(512, 1024), nested=True), torch.empty(512, 1024, dtype=dtype)

    def best(backend: str) -> float:
        times = []
        for _ in range(10):
            start = time.perf_counter()
            decode_4bit(packed, out, backend=backend)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("native") < best("torch")
