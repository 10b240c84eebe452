"""Who computes: the library unless asked otherwise, and an explicit request is served or refused, never replaced."""

from __future__ import annotations

import os

import pytest
import torch

from fastpeft_kernels.lora import Dtypes, api, backends, library, lora_linear, lora_linear_group
from fastpeft_kernels.lora.layout import flatten_group, unflatten_group
from fastpeft_kernels.lora.projection import Group
from tests.kernels.lora.groups import projection

X, W, A, B = torch.randn(3, 7), torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, groups_in_python: None) -> list[str]:
    """Names of the library's functions that were called."""
    found: list[str] = []
    for name in ("pack", "forward", "backward"):
        function = getattr(library, name)

        def record(*args: object, name: str = name, function: object = function) -> object:
            found.append(name)
            return function(*args)  # type: ignore[operator]

        monkeypatch.setattr(library, name, record)
    return found


@pytest.mark.parametrize("backend", ("auto", "library"))
def test_the_library_serves(backend: str, calls: list[str]) -> None:
    x = X.clone().requires_grad_()
    lora_linear(x, W, A, B, backend=backend).sum().backward()
    assert calls == ["pack", "forward", "pack", "backward"]


def test_checked_callers_need_name_no_backend(calls: list[str]) -> None:
    (y,) = api.run_group(X, [projection(7, 5, 2)], Dtypes(*[torch.float32] * 3), [None])
    assert y.shape == (3, 5) and calls[:2] == ["pack", "forward"]


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected 'auto', 'library' or 'triton', got 'cuda'"):
        lora_linear_group(X, [projection(7, 5, 2)], backend="cuda")


def test_triton_that_is_not_there(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(backends, "triton_available", lambda: False)
    with pytest.raises(ValueError, match="backend: 'triton' needs Triton, which cannot be imported here"):
        lora_linear(X, W, A, B, backend="triton")
    assert not calls


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves the CPU")
def test_triton_on_a_cpu(calls: list[str]) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"expected x on a GPU \(or Triton's interpreter\), got a tensor on the CPU"):
        lora_linear(X, W, A, B, backend="triton")
    assert not calls


@pytest.mark.interpreter
def test_dropout_where_the_assembler_is_not_trusted(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    monkeypatch.setattr(backends, "hopper_dots_safe", lambda device: f"not on {device}")
    with pytest.raises(ValueError, match="backend: 'triton' cannot serve this group: not on cpu"):
        lora_linear(X, W, A, B, dropout=0.5, backend="triton")
    assert not calls
    lora_linear(X, W, A, B, dropout=0.5, training=False, backend="triton")
    lora_linear(X, W, A, B, backend="triton")


@pytest.mark.interpreter
def test_a_gpu_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "device_capability", lambda device: 75)
    with pytest.raises(ValueError, match=r"expected compute capability 8.0 or later, .* got 7.5"):
        lora_linear(X, W, A, B, backend="triton")


class OnGpu:
    """Stands for a tensor on a GPU, of which the refusal reads device and dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("cuda", 0), dtype


def test_fp32_products_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "device_capability", lambda device: 90)
    f32, bf16 = torch.float32, torch.bfloat16
    for compute, lora in ((f32, f32), (bf16, f32), (f32, bf16)):
        group = Group([projection(7, 5, 2)], Dtypes(compute, lora, compute), [None], "triton")
        reason = backends.triton_refusal(OnGpu(f32), group)  # type: ignore[arg-type]
        assert reason is not None and reason.startswith("expected fp16 or bf16 products on a GPU, got torch.float32")
    group = Group([projection(7, 5, 2)], Dtypes(bf16, bf16, f32), [None], "triton")
    assert backends.triton_refusal(OnGpu(f32), group) is None  # type: ignore[arg-type]


def test_a_compiled_group_keeps_its_backend() -> None:
    group = Group([projection(7, 5, 2)], Dtypes(*[torch.float32] * 3), [None], "library")
    assert unflatten_group(*flatten_group(group)).group.backend == "library"
