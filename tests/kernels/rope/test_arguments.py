"""What is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.rope import api, rotary

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 1, 5, 8)
COS = torch.zeros(1, 5, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1]}, TypeError, "q: expected a floating tensor, got list"),
        ({"k": K.long()}, TypeError, "k: expected a floating tensor, got torch.int64"),
        ({"q": Q[0]}, ValueError, r"q: expected \(batch, heads, tokens, dim\), got shape \(4, 5, 8\)"),
        ({"k": K[:, :, :3]}, ValueError, r"k: expected batch, tokens, .* \(2, 5, 8\) .*, got shape \(2, 1, 3, 8\)"),
        ({"k": K.half()}, ValueError, "k: expected .*torch.float32, got .* torch.float16"),
        ({"cos": COS.to("meta")}, ValueError, "cos: expected a tensor on cpu like x, got meta"),
        ({"cos": COS[0]}, ValueError, r"cos: expected \(2 or 1, 5, an even number up to 8\) .*, got shape \(5, 8\)"),
        ({"sin": COS[..., :6]}, ValueError, r"sin: expected .* for both of cos and sin, got shape \(1, 5, 6\)"),
        ({"cos": COS[..., :3], "sin": COS[..., :3]}, ValueError, "cos: expected .*an even number"),
        ({"sin": COS.half()}, ValueError, "sin: expected the dtype of cos, torch.float32, got torch.float16"),
        ({"cos": COS.clone().requires_grad_()}, ValueError, "cos: expected a tensor that requires no gradient"),
        ({"angles": "half"}, ValueError, r"cos: expected \(2 or 1, 5, a number up to 4\) .*, got shape \(1, 5, 8\)"),
        ({"k": None, "cos": COS[0]}, ValueError, r"cos: expected \(2 or 1, 5, .*, got shape \(5, 8\)"),
        ({"layout": "split"}, ValueError, r"layout: expected one of \('halved', .*, 'separated'\), got 'split'"),
        ({"angles": "all"}, ValueError, r"angles: expected one of \('each', 'pairs', 'half'\), got 'all'"),
        ({"backend": "cuda"}, ValueError, r"backend: expected one of \('auto', .*\), got 'cuda'"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected a floating dtype or None, got torch.int8"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rotary(**{"q": Q, "k": K, "cos": COS, "sin": COS, **changes})


def test_triton_is_asked_for_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"'triton' was asked for, which takes .*, got torch.float64"):
        rotary(Q.double(), K.double(), COS, COS, backend="triton")
    monkeypatch.setattr(api, "triton_available", lambda: False)
    with pytest.raises(ImportError, match="Triton is not installed"):
        rotary(Q, K, COS, COS, backend="triton")


@pytest.mark.aot
def test_triton_takes_cuda_tensors() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="expected CUDA tensors for 'triton', got tensors on cpu"):
        rotary(Q, K, COS, COS, backend="triton")
