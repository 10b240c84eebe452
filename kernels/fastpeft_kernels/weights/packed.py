"""A frozen weight in the packed integers of GPTQ and AWQ checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import BlockwiseWeight


class PackedWeight(BlockwiseWeight):
    """(codes - zeros) * scales, the transposed matrix in groups of input features; used in place.

    An int32 holds 32 / bits codes, the first in its lowest bits. GPTQ packs codes along the input features and zeros
    along the output features; AWQ packs both along the output features, feature j of eight in
    nibble 0, 4, 1, 5, 2, 6, 3 or 7.

    Equivalent PyTorch, once unpacked: `((codes - zeros[groups]).to(scales.dtype) * scales[groups]).t()`.

    Args:
        codes: int32, (in_features * bits / 32, out_features) of GPTQ, (in_features, out_features / 8) of AWQ.
        zeros: int32 (number of groups, out_features * bits / 32).
        scales: (number of groups, out_features) of fp32, bf16 or fp16; the values are rounded to this dtype.
        groups: integers (in_features,), the group of each input feature; or how many of them, one after the other, are
            a group, for (in_features, ...) codes of AWQ.
        bits: 2, 4 or 8; 4 for AWQ.
        awq: whether the packing is AWQ's.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: `bits`, or shapes or devices that do not fit each other.

    Source: Frantar et al. 2023, arXiv:2210.17323 (GPTQ); Lin et al. 2024, arXiv:2306.00978 (AWQ). The layouts are those
        of the checkpoints that gptqmodel reads, GPTQ's zeros in its second format (stored as they are).
    """

    kind = "packed"

    def __init__(
        self, codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | int, bits: int, awq: bool
    ) -> None:
        expected = (4,) if awq else (2, 4, 8)
        if bits not in expected:
            raise ValueError(f"bits: expected one of {expected}, got {bits}")
        for name, tensor in (("codes", codes), ("zeros", zeros)):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name}: expected torch.int32, got {tensor.dtype}")
        if scales.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"scales: expected fp32, bf16 or fp16, got {scales.dtype}")
        if scales.dim() != 2 or codes.dim() != 2:
            shapes = f"{tuple(codes.shape)} and {tuple(scales.shape)}"
            raise ValueError(f"codes, scales: expected matrices, got shapes {shapes}")
        if isinstance(groups, Tensor):
            if groups.dtype not in (torch.int32, torch.int64) or groups.dim() != 1:
                raise TypeError(
                    f"groups: expected a vector of int32 or int64, got {groups.dtype} {tuple(groups.shape)}"
                )
            in_features = groups.shape[0]
        else:
            if groups < 1:
                raise ValueError(f"groups: expected at least one input feature, got {groups}")
            in_features = codes.shape[0] if awq else codes.shape[0] * (32 // bits)
        per_word, (count, out_features) = 32 // bits, scales.shape
        words = -(out_features // -per_word)
        shape = (in_features, words) if awq else (-(in_features // -per_word), out_features)
        for name, tensor, wanted in (("codes", codes, shape), ("zeros", zeros, (count, words))):
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{name}: expected shape {wanted}, got {tuple(tensor.shape)}")
        if isinstance(groups, int) and count != -(in_features // -groups):
            raise ValueError(f"scales: expected {-(in_features // -groups)} groups of {groups}, got {count}")
        for name, given in (("zeros", zeros), ("scales", scales), ("groups", groups)):
            if isinstance(given, Tensor) and given.device != codes.device:
                raise ValueError(f"{name}: expected a tensor on {codes.device}, got {given.device}")
        self.codes, self.zeros, self.scales, self.groups = codes, zeros, scales, groups
        self.bits, self.awq, self.shape = bits, awq, (out_features, in_features)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.scales.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.codes.device

    def decode_rows(self, out: Tensor, first: int, last: int) -> None:
        if self.awq:
            codes = self._of_outputs(self.codes, first, last)
        else:
            codes = self._unpacked(self.codes[:, first:last].unsqueeze(1), dim=1).flatten(0, 1)[: self.shape[1]]
        zeros = self._of_inputs(self._of_outputs(self.zeros, first, last))
        scales = self._of_inputs(self.scales[:, first:last])
        out.copy_(codes.sub_(zeros).to(scales.dtype).mul_(scales).t())

    def _of_inputs(self, statistics: Tensor) -> Tensor:
        """A row for each input feature, of one for each group."""
        if isinstance(self.groups, Tensor):
            return statistics[self.groups]
        return statistics.repeat_interleave(self.groups, 0)[: self.shape[1]]

    def _of_outputs(self, words: Tensor, first: int, last: int) -> Tensor:
        """The columns [first, last) of what is packed along the output features."""
        per_word = 32 // self.bits
        start = first // per_word
        values = self._unpacked(words[:, start : -(last // -per_word)].unsqueeze(2), dim=2)
        return values.flatten(1)[:, first - start * per_word : last - start * per_word]

    def _unpacked(self, words: Tensor, dim: int) -> Tensor:
        """Words along whose `dim` of length 1 there are their codes instead."""
        shape = [1] * words.dim()
        shape[dim] = -1
        place = torch.arange(32 // self.bits, dtype=torch.int32, device=words.device)
        if self.awq:
            place = place // 2 + place % 2 * 4
        return (words >> (place * self.bits).view(shape)).bitwise_and_((1 << self.bits) - 1)

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        meta: dict[str, Any] = {"bits": self.bits, "awq": self.awq, "groups": None}
        if isinstance(self.groups, Tensor):
            return (self.codes, self.zeros, self.scales, self.groups), meta
        return (self.codes, self.zeros, self.scales), {**meta, "groups": self.groups}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> PackedWeight:
        codes, zeros, scales, *rest = tensors
        return cls(codes, zeros, scales, rest[0] if rest else meta["groups"], meta["bits"], meta["awq"])
