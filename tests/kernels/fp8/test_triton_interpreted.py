"""The row kernel in Triton's interpreter, whose cast to e4m3 truncates carries: on numbers that need no rounding."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels.fp8 import quantise_rows

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("shape", ((3, 16), (2, 131), (1, 1), (2, 4100)))
def test_codes_and_scales(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Codes of random bits with 448 in each row, times a power of two; rows of another distance."""
    bits = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes = torch.where(bits % 128 == 127, 0, bits).view(torch.float8_e4m3fn).float()  # no NaN
    codes[torch.arange(shape[0]), torch.randint(0, shape[1], shape[:1])] = 448.0
    wider = torch.full((shape[0], shape[1] + 3), torch.nan, dtype=dtype)
    x = wider[:, : shape[1]]
    x.copy_(codes * torch.tensor([2.0**-5, 1.0, 2.0**3])[: shape[0], None])
    rows = quantise_rows(x, "triton")
    assert torch.equal(rows.codes.float(), codes)
    assert torch.equal(rows.scale, quantise_rows(x, "torch").scale)


def test_zero_rows_and_infinities() -> None:
    rows = quantise_rows(torch.tensor([[0.0, -0.0], [torch.inf, 1.0]]), "triton")
    assert rows.codes[0].float().tolist() == [0.0, 0.0] and rows.scale[1].isinf()
