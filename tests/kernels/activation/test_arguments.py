"""What is refused, and in which words; which backend serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.activation import api, gated_activation, gated_activation_backward
from fastpeft_kernels.native import activation as native

X = torch.zeros(4, 6)
ROOM = torch.zeros(5, 20)


def call(**changes: Any) -> None:
    arguments = {"gate": X, "up": X.clone(), "kind": "silu", **changes}
    gated_activation(**arguments)


def call_backward(**changes: Any) -> None:
    names = ("dh", "gate", "up", "dgate", "dup", "h")
    arguments = {name: torch.zeros(4, 6) for name in names} | {"kind": "silu"} | changes
    gated_activation_backward(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kind": "swish"}, ValueError, r"kind: expected one of \('silu', .*\), got 'swish'"),
        ({"backend": "cuda"}, ValueError, r"backend: expected one of \('auto', .*\), got 'cuda'"),
        ({"up": [1]}, TypeError, "up: expected a tensor in fp32, fp16, bf16 or fp64, got list"),
        ({"up": X.long()}, TypeError, r"up: expected a tensor .*, got torch.int64"),
        ({"up": X[0]}, ValueError, r"up: expected \(tokens, features\), got shape \(6,\)"),
        ({"gate": torch.zeros(4, 5)}, ValueError, r"gate: expected shape, .* of up, \(4, 6\), .*, got \(4, 5\), "),
        ({"gate": X.half()}, ValueError, r"gate: expected .*, torch.float32 and cpu, got \(4, 6\), torch.float16"),
        ({"gate": X.to("meta")}, ValueError, "gate: expected .* and cpu, got .* and meta"),
        ({"gate": torch.zeros(6, 4).t()}, ValueError, r"gate: expected contiguous columns .*, got strides \(1, 4\)"),
        ({"gate": X[:1].expand(4, 6)}, ValueError, r"gate: expected .* rows that do not overlap, got strides \(0, 1\)"),
        ({"out": torch.zeros(6, 4)}, ValueError, r"out: expected shape, .*, got \(6, 4\)"),
        (
            {"out": torch.zeros(4, 6, requires_grad=True)},
            ValueError,
            "out: expected a tensor that requires no gradient",
        ),
        (
            {"up": ROOM[:4, :6], "out": ROOM[:4, 2:8]},
            ValueError,
            "out: expected the very tensor up or memory of its own",
        ),
        (
            {"up": ROOM[:4, :6], "out": ROOM[1:, :6]},
            ValueError,
            "out: expected the very tensor up or memory of its own",
        ),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dh": X.double()}, ValueError, r"dh: expected .* torch.float32 and cpu, got \(4, 6\), torch.float64 and cpu"),
        ({"dup": None}, TypeError, "dup: expected a tensor .*, got NoneType"),
        ({"dgate": None}, ValueError, "dgate: expected a tensor with a gate, got None"),
        ({"gate": None}, ValueError, "dgate: expected None without a gate, got a tensor"),
        ({"h": torch.zeros(4, 12)[:, ::2]}, ValueError, "h: expected contiguous columns"),
        ({"dup": ROOM[:4, :6], "h": ROOM[:4, :6]}, ValueError, "dup: expected memory of its own, got some of h's"),
        (
            {"dup": ROOM[:4, :6], "dgate": ROOM[:4, 5:11]},
            ValueError,
            "dgate: expected memory of its own, got some of dup",
        ),
        ({"dh": ROOM[:4, :6], "h": ROOM.view(-1)[:24].view(4, 6)}, ValueError, "h: expected the very tensor dh"),
    ],
)
def test_refused_backward(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_backward(**changes)


def test_neighbours_in_one_tensor_are_taken() -> None:
    room = torch.randn(4, 36)
    dh, gate, up, dgate, dup, h = (room[:, i * 6 : i * 6 + 6] for i in range(6))
    call_backward(dh=dh, gate=gate, up=up, dgate=dgate, dup=dup, h=h)
    torch.testing.assert_close(h, gated_activation(gate, up, "silu"))


def test_what_was_asked_for_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: 'native' was asked for, which takes fp32, fp16 and bf16"):
        gated_activation(None, X.double(), "silu", backend="native")
    with pytest.raises(
        ValueError, match="backend: 'native' was asked for, which takes CPU tensors, got tensors on meta"
    ):
        gated_activation(None, X.to("meta"), "silu", backend="native")
    monkeypatch.setattr(native, "native_library", lambda: None)
    with pytest.raises(ValueError, match="backend: 'native' was asked for, which could not be built here"):
        gated_activation(None, X, "silu", backend="native")
    torch.testing.assert_close(gated_activation(None, X + 1, "silu"), torch.nn.functional.silu(X + 1))
    monkeypatch.setattr(api, "triton_available", lambda: False)
    with pytest.raises(ImportError, match="Triton is not installed"):
        gated_activation(None, X, "silu", backend="triton")


def test_triton_takes_cuda_tensors() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"expected CUDA tensors for 'triton'|got torch.float64"):
        gated_activation(None, X.double(), "silu", backend="triton")
