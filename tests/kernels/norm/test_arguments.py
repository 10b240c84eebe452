"""What is refused, and in which words; which backend serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.norm import api, gated_rms_norm, layer_norm, rms_norm

X, W = torch.zeros(4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1]}, TypeError, "x: expected a floating tensor, got list"),
        ({"x": X.long()}, TypeError, "x: expected a floating tensor, got torch.int64"),
        ({"x": X[0, 0]}, ValueError, r"x: expected \(..., features\), got a tensor without dimensions"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
        ({"weight": 1.0}, TypeError, "weight: expected a Tensor, got float"),
        ({"weight": W.to("meta")}, ValueError, "weight: expected a tensor on cpu like x, got meta"),
        ({"eps": None}, TypeError, "eps: expected a float or int, got NoneType"),
        ({"offset": "1"}, TypeError, "offset: expected a float or int, got str"),
        ({"rounding": "twice"}, ValueError, r"rounding: expected one of \('input', .*\), got 'twice'"),
        ({"backend": "cuda"}, ValueError, r"backend: expected one of \('auto', .*\), got 'cuda'"),
        (
            {"backend": "aten", "offset": 1.0},
            ValueError,
            "backend: 'aten' was asked for, which takes no offset or gate",
        ),
        ({"backend": "aten", "weight": W.half()}, ValueError, "'aten' was asked for, .* weights of x's dtype"),
        ({"backend": "triton", "x": X.double()}, ValueError, "'triton' was asked for, .* got torch.float64"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(error, match=message):
        rms_norm(**{"x": X, "weight": W, "eps": 1e-6, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gate": X[0]}, ValueError, r"gate: expected shape \(4, 6\), got \(6,\)"),
        ({"gate": X.long()}, TypeError, "gate: expected a floating dtype, got torch.int64"),
        ({"norm_before_gate": 1}, TypeError, "norm_before_gate: expected a bool, got int"),
        ({"activation": "relu"}, ValueError, r"activation: expected one of \('silu', 'sigmoid'\), got 'relu'"),
        ({"groups": 4}, ValueError, "groups: expected an integer that divides 6 features, got 4"),
        ({"rounding": "twice"}, ValueError, r"rounding: expected one of \('input', .*\), got 'twice'"),
        ({"backend": "aten"}, ValueError, "backend: 'aten' was asked for, which takes no offset or gate"),
    ],
)
def test_refused_of_gated_norms(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gated_rms_norm(**{"x": X, "gate": X, "weight": W, "eps": 1e-6, **changes})


def test_a_bias_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"bias: expected shape \(6,\), got \(4, 6\)"):
        layer_norm(X, W, X)


def test_triton_is_asked_for_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "triton_available", lambda: False)
    with pytest.raises(ImportError, match="Triton is not installed"):
        rms_norm(X, W, 1e-6, backend="triton")


@pytest.mark.aot
def test_triton_takes_cuda_tensors_of_rows_it_can_hold() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="expected CUDA tensors for 'triton', got tensors on cpu"):
        rms_norm(X, W, 1e-6, backend="triton")


def test_the_default_is_pytorch_s_own_where_that_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "triton_serves", lambda device: True)
    few, many, wide = (torch.empty(n, k, device="meta") for n, k in ((4, 6), (2**21, 6), (4, 40000)))

    class OnCuda:
        """What the choice reads of a tensor."""

        is_cuda = True

        def __init__(self, x: torch.Tensor) -> None:
            self.shape, self.dtype, self.device, self.numel = x.shape, x.dtype, x.device, x.numel

    def chosen(x: Any, weight: Any = None, **changes: Any) -> str:
        form = api.layer_form(x.dtype, 1e-5) if changes.pop("centred", False) else None
        form = form or api.rms_form(x.dtype, x.dtype, 1e-6, changes.pop("offset", 0.0), "input")._replace(**changes)
        return api._default(x, weight, None, form)

    assert chosen(OnCuda(few)) == "aten" and chosen(OnCuda(many)) == "triton"
    assert chosen(OnCuda(few), offset=1.0) == "triton"
    assert chosen(OnCuda(few), W.half()) == "triton"
    assert chosen(OnCuda(wide)) == "aten" and chosen(OnCuda(wide), offset=1.0) == "torch"
    gated = OnCuda(torch.empty(4, 8192, device="meta"))
    assert [chosen(gated, norm_before_gate=last) for last in (True, False)] == ["triton", "torch"]  # in fp32
    assert chosen(gated, norm_before_gate=False, groups=2) == "triton"
    assert chosen(OnCuda(wide), norm_before_gate=True) == "torch"
    assert chosen(OnCuda(many), centred=True) == "aten" and chosen(few, centred=True) == "aten"
    monkeypatch.setattr(api, "triton_serves", lambda device: False)
    assert chosen(few) == "torch" and chosen(OnCuda(many)) == "aten"
