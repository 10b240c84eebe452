"""The error budget that every op is held to, as the ops' own benchmarks have it."""

from fastpeft_kernels.common.budget import assert_within_budget

__all__ = ["assert_within_budget"]
