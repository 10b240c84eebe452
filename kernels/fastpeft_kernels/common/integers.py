"""Arithmetic of launchers, where Triton's own functions of these names take the host 3 us a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least one that is not below n; 1 for what is less."""
    return 1 << (max(n, 1) - 1).bit_length()
