"""What the two launchers of `fused_forward` and `fused_backward` share: tiles, and checks of arguments."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import triton
from torch import Tensor

from ..activation import KINDS
from ..lora.configs import multiprocessors
from .fused import MAX_RANK

_LARGEST_OFFSET = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Config:
    """Tile of one step of a program.

    Attributes:
        block_m, block_n: tokens and features; powers of two, at least 16.
        num_warps: launch option.
        per_sm: programs a multiprocessor that the splits of a sum aim at, without exceeding it.
        parts: backward only: column parts whose shares of dS are multiplied each by warps of their own, then added;
            a power of two, at most block_n / 16. One leaves all warps with all columns.
        registers: most registers a thread, for the sake of more programs at a time; None for no limit.
    """

    block_m: int
    block_n: int
    num_warps: int
    per_sm: int
    parts: int = 1
    registers: int | None = None

    @property
    def label(self) -> str:
        """Such as "16x128 4w", and with parts and a limit of registers "16x256 8w 8 parts 168r"."""
        parts = f" {self.parts} parts" * (self.parts > 1)
        return f"{self.block_m}x{self.block_n} {self.num_warps}w{parts}" + f" {self.registers}r" * bool(self.registers)

    def splits(self, length: int, step: int, others: int, device: torch.device) -> tuple[int, int]:
        """(splits, length of each, a multiple of `step`) of a sum cut among programs, `others` of them to a split.

        Depends on shapes and the device alone, so that the partial sums are the same every time.
        """
        wanted = self.per_sm * multiprocessors(device) // others
        splits = max(1, min(wanted, ceil(length / step)))
        each = ceil(ceil(length / splits) / step) * step
        return ceil(length / each), each


def check_matrices(matrices: dict[str, Tensor | None], config: Config, kernel: object) -> None:
    """Raise unless all are 16-bit matrices like `up`, columns contiguous, on a device where `kernel` runs.

    Args:
        matrices: by the name of the argument, with "up" among them; None is passed over.
        config: its tiles have to be addressable.
        kernel: a Triton function, or the interpreter's of it.

    Raises:
        TypeError: not all fp16, or not all bf16.
        ValueError: another shape, device or layout; bf16 in the interpreter.
    """
    up = matrices["up"]
    assert up is not None
    if isinstance(kernel, triton.JITFunction):
        if up.device.type != "cuda":
            raise ValueError(f"up: expected a tensor on a CUDA device, got one on {up.device}")
    elif up.dtype == torch.bfloat16:
        raise ValueError("up: expected fp16 in Triton's interpreter, which computes bfloat16 wrongly, got bf16")
    if up.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"up: expected fp16 or bf16, got {up.dtype}")
    if up.dim() != 2:
        raise ValueError(f"up: expected (tokens, features), got shape {tuple(up.shape)}")
    for name, x in matrices.items():
        if x is None:
            continue
        _check_like(name, x, up)
        if x.shape != up.shape:
            raise ValueError(f"{name}: expected the shape of up, {tuple(up.shape)}, got {tuple(x.shape)}")
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"{name}: expected contiguous columns, got strides {x.stride()}")
        if config.block_m * x.stride(0) + x.shape[1] > _LARGEST_OFFSET:
            raise ValueError(f"{name}: expected {config.block_m} rows within 2**31 elements, got strides {x.stride()}")


def check_activation(activation: str) -> None:
    """Raise ValueError unless it is one of `activation.KINDS`."""
    if activation not in KINDS:
        raise ValueError(f"activation: expected one of {', '.join(KINDS)}, got {activation!r}")


def check_one_stride(names: str, a: Tensor | None, b: Tensor) -> None:
    """Raise ValueError unless the rows of both are equally far apart, as those of the halves of one buffer are."""
    if a is not None and a.stride(0) != b.stride(0):
        raise ValueError(f"{names}: expected rows equally far apart, got strides {a.stride()} and {b.stride()}")


def check_factor(name: str, factor: Tensor, rows: int, up: Tensor, rank: int | None = None) -> None:
    """Raise unless `factor` is (rows, rank), of the dtype and device of `up`; of any rank up to MAX_RANK when None."""
    _check_like(name, factor, up)
    if factor.dim() != 2 or factor.shape[0] != rows or not 1 <= factor.shape[1] <= MAX_RANK:
        raise ValueError(f"{name}: expected {rows} vectors of 1 to {MAX_RANK} ranks, got shape {tuple(factor.shape)}")
    if rank is not None and factor.shape[1] != rank:
        raise ValueError(f"{name}: expected a rank of {rank}, got {factor.shape[1]}")


def _check_like(name: str, x: Tensor, up: Tensor) -> None:
    if x.dtype != up.dtype:
        raise TypeError(f"{name}: expected the dtype of up, {up.dtype}, got {x.dtype}")
    if x.device != up.device:
        raise ValueError(f"{name}: expected the device of up, {up.device}, got {x.device}")
