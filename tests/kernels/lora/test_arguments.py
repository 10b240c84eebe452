# ruff: noqa: E501
"""Bad arguments: a message that names the argument, what was expected and what came."""

import pytest
import torch

from fastpeft_kernels.lora import LoraAdapter, LoraProjection, lora_linear, lora_linear_group
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import DenseWeight, FourBitWeight

W = torch.randn(6, 8)
A, B = torch.randn(2, 8), torch.randn(6, 2)
X = torch.randn(3, 8)


def grouped(x=X, **fields):
    return lora_linear_group(
        x, [LoraProjection(DenseWeight(W), fields.pop("base_bias", None), (LoraAdapter(**{"a": A, "b": B, **fields}),))]
    )


def mixed(adapter_index, bias=None, count=1):
    group = [LoraProjection(DenseWeight(W), None, (LoraAdapter(A, B, bias=bias),) * count)]
    return lora_linear_group(X, group, adapter_index=adapter_index)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grouped(x=X.long()), TypeError, "x: expected a floating tensor, got torch.int64"),
        (lambda: grouped(x="text"), TypeError, "x: expected a floating tensor, got str"),
        (lambda: grouped(x=torch.tensor(1.0)), ValueError, r"x: expected shape \(..., in_features\), got a 0-d tensor"),
        (lambda: grouped(x=torch.randn(3, 7)), ValueError, r"x: expected last size 8 for projections\[0\], got shape \(3, 7\)"),
        (lambda: grouped(a=torch.randn(0, 8), b=torch.randn(6, 0)), ValueError, r"adapters\[0\].a: expected \(rank >= 1, 8\), got \(0, 8\)"),
        (lambda: grouped(a=torch.randn(2, 9)), ValueError, r"adapters\[0\].a: expected shape \(2, 8\), got \(2, 9\)"),
        (lambda: grouped(b=torch.randn(2, 6)), ValueError, r"adapters\[0\].b: expected shape \(6, 2\), got \(2, 6\)"),
        (lambda: grouped(b=B.half()), TypeError, r"adapters\[0\].b: expected the dtype of a, torch.float32, got torch.float16"),
        (lambda: grouped(b=B.long(), a=A.long()), TypeError, r"adapters\[0\].a: expected a floating dtype, got torch.int64"),
        (lambda: grouped(bias=torch.randn(5)), ValueError, r"adapters\[0\].bias: expected shape \(6,\), got \(5,\)"),
        (lambda: grouped(base_bias=torch.randn(5)), ValueError, r"projections\[0\].bias: expected shape \(6,\), got \(5,\)"),
        (lambda: grouped(dropout=1.0), ValueError, r"adapters\[0\].dropout: expected a probability in \[0, 1\), got 1.0"),
        (lambda: grouped(a=A.to("meta")), ValueError, r"adapters\[0\].a: expected a tensor on cpu like x, got meta"),
        (lambda: grouped(x=X.to("meta")), ValueError, r"projections\[0\].weight: expected a tensor on meta like x, got cpu"),
        (lambda: mixed(torch.zeros(3).long()), TypeError, "adapter_index: expected a tuple or list, got Tensor"),
        (lambda: mixed([0, 1.5, 0]), TypeError, r"adapter_index: expected integers, got \[0, 1.5, 0\]"),
        (lambda: mixed([0, 0]), ValueError, r"adapter_index: expected a number for each row of x \(rows, ..., in_features\), got 2 for x of shape \(3, 8\)"),
        (lambda: mixed([0, 0, 0], torch.randn(6)), ValueError, "adapter_index: expected adapters without bias in a mixed batch, got one with"),
        (lambda: mixed([0, 0, 0], count=2), ValueError, r"adapter_index: expected adapters of differing index in each projection, got \[0, 0\]"),
        (lambda: lora_linear_group(X, []), ValueError, "projections: expected at least one, got none"),
        (lambda: lora_linear_group(X, [LoraProjection(W)]), TypeError, r"projections\[0\].weight: expected a FrozenWeight, got Tensor"),
        (lambda: lora_linear(X, W[0], A, B), ValueError, r"weight: expected \(out_features, in_features\), got shape \(8,\)"),
        (lambda: lora_linear(X, W.long(), A, B), TypeError, "weight: expected a floating tensor, got torch.int64"),
        (lambda: lora_linear(X, None, A, B), TypeError, "weight: expected a floating tensor, got NoneType"),
        (lambda: lora_linear(X, W.to_sparse(), A, B), TypeError, "weight: expected a dense tensor, got layout torch.sparse_coo"),
        (lambda: grouped(x=X.to_sparse()), TypeError, "x: expected a dense tensor, got layout torch.sparse_coo"),
        (lambda: grouped(x=X.cfloat()), TypeError, "x: expected a floating tensor, got torch.complex64"),
        (lambda: grouped(x=X.to(torch.float8_e4m3fn)), TypeError, "x: expected a dtype of .*, got torch.float8_e4m3fn"),
        (lambda: lora_linear(*(t.to("meta") for t in (X, W, A, B))), ValueError, "x: expected a tensor with values, got one on the meta device"),
        (lambda: grouped(a=None), TypeError, r"adapters\[0\].a: expected a Tensor, got NoneType"),
        (lambda: grouped(b=[1.0]), TypeError, r"adapters\[0\].b: expected a Tensor, got list"),
        (lambda: grouped(b=B.to_sparse()), TypeError, r"adapters\[0\].b: expected a dense tensor, got layout"),
        (lambda: grouped(bias=[1.0]), TypeError, r"adapters\[0\].bias: expected a Tensor, got list"),
        (lambda: grouped(scaling=None), TypeError, r"adapters\[0\].scaling: expected a float or int or Tensor, got NoneType"),
        (lambda: grouped(scaling=torch.tensor(1.0, device="meta")), ValueError, r"adapters\[0\].scaling: expected a tensor on cpu"),
        (lambda: grouped(dropout="half"), TypeError, r"adapters\[0\].dropout: expected a float or int, got str"),
        (lambda: grouped(dropout=float("nan")), ValueError, r"adapters\[0\].dropout: expected a probability in \[0, 1\), got nan"),
        (lambda: lora_linear_group(X, None), TypeError, "projections: expected a list or tuple, got NoneType"),
        (lambda: lora_linear_group(X, [W]), TypeError, r"projections\[0\]: expected a LoraProjection, got Tensor"),
        (lambda: lora_linear_group(X, [LoraProjection(DenseWeight(W), None, None)]), TypeError, r"projections\[0\].adapters: expected a tuple or list, got NoneType"),
        (lambda: lora_linear_group(X, [LoraProjection(DenseWeight(W), None, (A,))]), TypeError, r"adapters\[0\]: expected a LoraAdapter, got Tensor"),
        (lambda: lora_linear_group(X, [LoraProjection(DenseWeight(W))], compute_dtype="bf16"), TypeError, "compute_dtype: expected a floating dtype of .*, got 'bf16'"),
        (lambda: lora_linear_group(X, [LoraProjection(DenseWeight(W))], seeds=3), TypeError, "seeds: expected a list or tuple, got int"),
        (lambda: lora_linear(X, FourBitWeight(encode_4bit(torch.ones(6, 64))), A, B), ValueError, r"x: expected last size 64 for projections\[0\], got shape \(3, 8\)"),
    ],
)  # fmt: skip
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_adapters_of_two_dtypes_need_a_choice():
    adapters = (LoraAdapter(A, B), LoraAdapter(A.double(), B.double()))
    with pytest.raises(TypeError, match=r"projections: expected adapters of one dtype, or lora_dtype to be given, got"):
        lora_linear_group(X, [LoraProjection(DenseWeight(W), None, adapters)])
    lora_linear_group(X, [LoraProjection(DenseWeight(W), None, adapters)], lora_dtype=torch.float32)


def test_one_seed_a_projection():
    with pytest.raises(ValueError, match="seeds: expected 1, one for each projection, got 2"):
        lora_linear_group(X, [LoraProjection(DenseWeight(W))], seeds=[None, None])
