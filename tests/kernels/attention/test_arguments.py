"""What is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.attention import Mask, attention

X = torch.zeros(2, 4, 5, 8)
K = torch.zeros(2, 2, 7, 8)
INDICES = torch.zeros(2, 5, dtype=torch.int32)
REAL = torch.ones(2, 7, dtype=torch.bool)


def call(**changes: Any) -> None:
    attention(**({"q": X, "k": K, "v": K, "backend": "blockwise"} | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1]}, TypeError, "q: expected a tensor in fp64, fp32, bf16 or fp16, got list"),
        ({"q": X.long()}, TypeError, "q: expected a tensor in fp64, .*, got torch.int64"),
        ({"q": X.to(torch.float8_e4m3fn)}, TypeError, "q: expected a tensor .*, got torch.float8_e4m3fn"),
        ({"q": X[0]}, ValueError, r"q: expected \(batch, heads, tokens, features\), got shape \(4, 5, 8\)"),
        ({"k": K.half()}, ValueError, "k: expected torch.float32 on cpu like q, got torch.float16 on cpu"),
        ({"v": K.to("meta")}, ValueError, "v: expected torch.float32 on cpu like q, got torch.float32 on meta"),
        ({"k": K[..., :4]}, ValueError, r"k: expected batch 2 and 8 features like q, got shape \(2, 2, 7, 4\)"),
        ({"v": K[:, :, :3]}, ValueError, r"v: expected \(2, 2, 7, v_features\) like k, got shape \(2, 2, 3, 8\)"),
        ({"q": X[:, :3]}, ValueError, "k: expected a number of heads that divides q's 3, got 2"),
        ({"mask": REAL}, TypeError, "mask: expected a Mask, got Tensor"),
        ({"mask": Mask(left=1.5)}, TypeError, "mask.left: expected an integer or None, got float"),
        ({"mask": Mask(start=INDICES)}, ValueError, "mask.stop: expected a tensor with mask.start, got None"),
        ({"mask": Mask(stop=INDICES)}, ValueError, "mask.start: expected a tensor with mask.stop, got None"),
        (
            {"mask": Mask(start=INDICES.long(), stop=INDICES)},
            TypeError,
            "mask.start: expected torch.int32, got torch.int64",
        ),
        (
            {"mask": Mask(start=INDICES, stop=INDICES[:, :4])},
            ValueError,
            r"mask.stop: expected shape \(1 or 2, 5\), got \(2, 4\)",
        ),
        ({"mask": Mask(keys=REAL[:, :5])}, ValueError, r"mask.keys: expected shape \(1 or 2, 7\), got \(2, 5\)"),
        ({"mask": Mask(keys=REAL.long())}, TypeError, "mask.keys: expected torch.bool, got torch.int64"),
        ({"mask": Mask(keys=REAL.to("meta"))}, ValueError, "mask.keys: expected a tensor on cpu like q, got meta"),
        (
            {"mask": Mask(dense=torch.ones(3, 5, 7, dtype=torch.bool))},
            ValueError,
            r"mask.dense: expected a shape that broadcasts to \(2, 4, 5, 7\), got \(3, 5, 7\)",
        ),
        ({"scale": "1"}, TypeError, "scale: expected a float or int, got str"),
        ({"scale": torch.inf}, ValueError, "scale: expected a finite number, got inf"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"relative": torch.zeros(4, 12)}, ValueError, r"relative: expected shape \(4, 11\), got \(4, 12\)"),
        ({"bias": torch.zeros(5, 7, dtype=torch.bool)}, TypeError, "bias: expected a floating tensor, got torch.bool"),
        (
            {"bias": torch.zeros(1, 1, 1, 5, 7)},
            ValueError,
            r"bias: expected a shape that broadcasts to \(2, 4, 5, 7\), got",
        ),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \(4,\), got \(2,\)"),
        ({"seed": torch.zeros(1)}, TypeError, "seed: expected torch.int64, got torch.float32"),
        ({"seed": torch.zeros(2).long()}, ValueError, r"seed: expected shape \(1,\), got \(2,\)"),
        ({"backend": "math"}, ValueError, r"backend: expected one of \('auto', .*\), got 'math'"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 2.0}, "expected no softcap"),
        ({"relative": torch.zeros(4, 11)}, "expected no relative"),
        ({"sinks": torch.zeros(4)}, "expected no sinks"),
        ({"dropout": 0.1, "seed": torch.tensor([3])}, "expected no seed of the dropout"),
        ({"return_lse": True}, "expected return_lse=False, got True"),
        ({"mask": Mask(start=INDICES, stop=INDICES)}, "expected a mask without start and stop"),
        ({"mask": Mask(right=0)}, "expected causal attention of as many queries as keys"),
        ({"mask": Mask(right=0, keys=REAL)}, "expected one of bounds, keys, dense and bias"),
        ({"bias": torch.zeros(5, 7, requires_grad=True)}, "expected a bias without gradient"),
        ({"bias": torch.zeros(5, 7, dtype=torch.float64)}, "expected a bias in q's torch.float32 on a CPU"),
        ({"q": X.repeat(1, 1, 4, 1), "v": K[..., :5]}, "expected sizes, strides and dtypes that one of its fused"),
    ],
)
def test_what_was_asked_for_never_falls_back(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"backend: 'sdpa' was asked for, which cannot serve: {reason}"):
        call(backend="sdpa", **changes)


def test_triton_takes_gpu_tensors() -> None:
    pytest.importorskip("triton")
    with pytest.raises(
        ValueError,
        match=r"backend: 'triton' was asked for, which cannot serve: expected (q on a GPU|fp16, bf16 or fp32)",
    ):
        call(backend="triton", q=X.double(), k=K.double(), v=K.double())
