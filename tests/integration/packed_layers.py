"""Layers that stand for gptqmodel's, which wants another torch: attributes and arithmetic of its version 7.7.

They keep the integers as they were, so that what is read from the packed words is held against what went into them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # feature of each nibble, the lowest first


class _Packed(nn.Module):
    adapter = None

    def __init__(self, linear: nn.Linear, bits: int, groups: Tensor) -> None:
        """Rounds the weight to `bits` in groups of input features, scales in 16 bits."""
        super().__init__()
        self.bits, self.group_size = bits, GROUP
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().float().t()  # (in, out), as these libraries store it
        count = int(groups.max()) + 1
        parts = [weight[groups == group] for group in range(count)]
        low, high = torch.stack([p.amin(0) for p in parts]), torch.stack([p.amax(0) for p in parts])
        dtype = torch.bfloat16 if linear.weight.dtype == torch.bfloat16 else torch.float16
        scales = ((high - low) / (2**bits - 1)).to(dtype)
        self.plain_zeros = (-low / scales.float()).round().clamp(0, 2**bits - 1).int()
        codes = weight / scales.float()[groups] + self.plain_zeros[groups]
        self.plain_codes = codes.round().clamp(0, 2**bits - 1).int()
        self.plain_groups = groups
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.register_buffer("qzeros", self._words(self.plain_zeros))

    def _words(self, values: Tensor) -> Tensor:
        """Packed along the last dimension."""
        per_word = 32 // self.bits
        parts = values.long().view(values.shape[0], -1, per_word)[..., self._order()]
        return sum(parts[..., i] << self.bits * i for i in range(per_word)).to(torch.int32)

    def _order(self) -> list[int]:
        return list(range(32 // self.bits))

    def dequantize_weight(self) -> Tensor:
        """(in_features, out_features) in the dtype of the scales."""
        codes = self.plain_codes - self.plain_zeros[self.plain_groups]
        return self.scales[self.plain_groups] * codes


class TorchLinear(_Packed):
    """gptqmodel.nn_modules.qlinear.torch.TorchLinear."""

    planar = online_full_had = online_partial_had = False
    pack_dtype = torch.int32
    zeros_format = 2

    def __init__(self, linear: nn.Linear, bits: int = 4, shuffled: bool = False) -> None:
        groups = torch.arange(linear.in_features) // GROUP
        super().__init__(linear, bits, groups[torch.randperm(len(groups))] if shuffled else groups)
        self.register_buffer("qweight", self._words(self.plain_codes.t()).t().contiguous())
        self.register_buffer("g_idx", self.plain_groups.int())

    def qzero_format(self) -> int:
        return self.zeros_format

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x.reshape(-1, x.shape[-1]), self.dequantize_weight().to(x.dtype))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], -1)


class AwqTorchLinear(_Packed):
    """gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, 4, torch.arange(linear.in_features) // GROUP)
        self.register_buffer("qweight", self._words(self.plain_codes))

    def _order(self) -> list[int]:
        return AWQ_ORDER

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
        self.scales = self.scales.to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)
        y = torch.matmul(x.reshape(-1, x.shape[-1]).to(dtype), self.dequantize_weight())
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def dequantize_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """What AwqTorchLinear decodes with, (in_features, out_features)."""

    def unpacked(words: Tensor) -> Tensor:
        values = torch.stack([words >> bits * AWQ_ORDER.index(i) & 15 for i in range(8)], -1)
        return values.flatten(1)

    rows = torch.arange(qweight.shape[0]) // group_size
    return (unpacked(qweight) - unpacked(qzeros)[rows]) * scales[rows]


PLACES = ("gptqmodel.nn_modules.qlinear.torch", "gptqmodel.nn_modules.qlinear.torch_awq")
"""The modules of gptqmodel in which these would be."""
