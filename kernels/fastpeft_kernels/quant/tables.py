"""The code tables of NF4, FP4 and the 8-bit scales, and the thresholds between their values.

Built on the CPU at each call, so that every device and mode sees the same bits. Only encoding needs them: a stored
weight brings its tables along.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quantiles of the standard normal distribution, scaled to [-1, 1] (QLoRA, appendix E), as bitsandbytes rounds them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# One sign, two exponent and one mantissa bit, in units of the largest value, 12.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# The smallest scale that encoding divides by.
TINY = 1e-38
# FP4's nibbles by rising value. Of the two zeros, 0 serves [-threshold, 0] and 8 what is above, as on bitsandbytes'
# CPU path.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


def code_table(quant_type: str, device: torch.device) -> Tensor:
    """(16,) fp32: the value of each nibble, in [-1, 1]."""
    if quant_type == "nf4":
        table = torch.tensor(_NF4, dtype=torch.float32, device="cpu")
    else:
        positive = torch.tensor(_FP4_TWELFTHS, dtype=torch.float32, device="cpu") / 12.0
        table = torch.cat([positive, 0.0 - positive])  # 0 - 0 keeps the second zero positive, as bitsandbytes stores it
    return table.to(device)


def rank_tables(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds (15,) fp32 between neighbouring values, and the nibble (16,) uint8 of each rank of values.

    A value's rank is the number of thresholds that are not >= it: a tie goes down, NaN to the top.
    """
    order = torch.tensor(range(16) if quant_type == "nf4" else _FP4_ORDER, device="cpu")
    rising = code_table(quant_type, torch.device("cpu"))[order]
    return ((rising[:-1] + rising[1:]) / 2).to(device), order.to(device, torch.uint8)


def dynamic_code(device: torch.device) -> Tensor:
    """(256,) fp32, rising: the signed dynamic 8-bit type, a decimal exponent in unary and a linear fraction.

    Source: 8-bit Approximations for Parallelism in Deep Learning, Dettmers 2015, arXiv:1511.04561.
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0 * 10 ** (exponent - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)
