"""Verdicts on results that lie on a GPU, read back together: each wait for it costs more than what it waits for."""

from __future__ import annotations

import torch
from torch import Tensor


class Verdicts:
    """Comparisons that are made on the GPU and judged at the end, by `settle`."""

    def __init__(self) -> None:
        self._budgets: list[tuple[str, Tensor, float]] = []
        self._equal: list[tuple[str, Tensor]] = []

    def within(self, ours: Tensor, same: Tensor, exact: Tensor, what: str) -> None:
        """max|ours - exact| is to stay within 2 max|same - exact| + eps max|exact|, and all of ours finite.

        Args:
            ours, same: results of one dtype: of the op, and of plain PyTorch.
            exact: the fp64 oracle.
            what: for the message.
        """
        assert ours.shape == same.shape == exact.shape and ours.dtype == same.dtype, (
            f"{what}: {ours.shape} {ours.dtype}"
        )
        if ours.numel():
            eps = torch.finfo(ours.dtype).eps
            figures = [(ours.double() - exact).abs().max(), (same.double() - exact).abs().max(), exact.abs().max()]
            self._budgets.append((what, torch.stack([*figures, (~ours.isfinite()).sum().double()]), eps))

    def equal(self, ours: Tensor, wanted: Tensor, what: str) -> None:
        """The same bits are to be in both, but that a NaN equals any other."""
        assert ours.shape == wanted.shape and ours.dtype == wanted.dtype, f"{what}: {tuple(ours.shape)} {ours.dtype}"
        self._equal.append((what, ((ours != wanted) & ~(ours.isnan() & wanted.isnan())).sum()))

    def settle(self) -> float:
        """The largest share of a budget that was used.

        Raises:
            AssertionError: the first comparison that did not hold.
        """
        if self._equal:
            for (what, _), differing in zip(
                self._equal, torch.stack([n for _, n in self._equal]).tolist(), strict=True
            ):
                assert differing == 0, f"{what}: {differing} elements differ"
        worst = 0.0
        rows = torch.stack([row for _, row, _ in self._budgets]).tolist() if self._budgets else []
        for (what, _, eps), (error, theirs, largest, strange) in zip(self._budgets, rows, strict=True):
            assert strange == 0, f"{what}: {strange:.0f} elements are not finite"
            budget = 2 * theirs + eps * largest
            assert error <= budget, (
                f"{what}: error {error:.3e} over its budget {budget:.3e}; PyTorch errs by {theirs:.3e}"
            )
            worst = max(worst, error / budget if budget else 0.0)
        return worst
