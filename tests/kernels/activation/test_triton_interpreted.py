"""The Triton kernels in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.activation import KINDS, gated_activation, gated_activation_backward

from .conftest import Case, comparable, make_case, special_case

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]

DTYPES = (torch.float32, torch.float16)  # the interpreter computes bfloat16 wrongly
SHAPES = ((5, 33), (1, 1), (0, 4), (4, 0))

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiles that the interpreter can afford, so that a matrix has several."""
    tiles = pytest.importorskip("fastpeft_kernels.activation.tiles")
    return [tiles.Config(1, 16, 1), tiles.Config(2, 32, 1), tiles.Config(4, 16, 1)]


def run(case: Case, config: Any, with_h: bool = True) -> dict[str, torch.Tensor | None]:
    from fastpeft_kernels.activation.backward import gated_activation_backward_triton
    from fastpeft_kernels.activation.forward import gated_activation_triton

    out = torch.full(tuple(case.up.shape), torch.nan, dtype=case.up.dtype)
    gated_activation_triton(case.gate, case.up, case.kind, out, config)
    case.hold(h=out)
    h, dgate, dup = case.results()
    given = h if with_h else None
    gated_activation_backward_triton(case.dh, case.gate, case.up, case.kind, dgate, dup, given, config)
    assert h._base is not None and h._base[:, case.up.shape[1] :].isnan().all(), "wrote beside h"
    return {"dgate": dgate, "dup": dup, "h": given}


@every_kind
@every_dtype
@pytest.mark.parametrize("gated", (True, False), ids=("gated", "ungated"))
def test_within_budget(kind: str, dtype: torch.dtype, gated: bool, small_tiles: Any) -> None:
    # several tiles a row, the last in part; one row in part; rows narrower than the tile
    for (rows, columns), config in zip(((2, 35), (5, 30), (9, 3)), small_tiles, strict=True):
        case = make_case(kind, rows, columns, dtype, gated)
        case.hold(**run(case, config, with_h=columns != 30))


@every_dtype
def test_every_configuration(dtype: torch.dtype) -> None:
    tiles = pytest.importorskip("fastpeft_kernels.activation.tiles")
    for config in tiles.CONFIGS:
        case = make_case("silu", 3, 61, dtype)
        case.hold(**run(case, config))


@every_kind
def test_through_the_public_functions_in_place(kind: str) -> None:
    for rows, columns in SHAPES:
        case = make_case(kind, rows, columns, torch.float32)
        exact, same = case.plain(torch.float64), case.plain(torch.float32)
        h = gated_activation(case.gate, case.up, kind, backend="triton")
        gated_activation_backward(
            case.dh, case.gate, case.up, kind, dgate=case.gate, dup=case.up, h=case.dh, backend="triton"
        )
        assert torch.equal(case.dh, h)
        for ours, name in ((case.gate, "dgate"), (case.up, "dup")):
            torch.testing.assert_close(ours.double(), exact[name], rtol=2e-5, atol=1e-6)
            assert same[name].shape == ours.shape


@every_kind
@every_dtype
def test_special_values_as_in_pytorch(kind: str, dtype: torch.dtype) -> None:
    case = special_case(kind, dtype)
    ours = {name: torch.empty_like(case.dh) for name in ("h", "dgate", "dup")}
    gated_activation_backward(case.dh, case.gate, case.up, kind, **ours, backend="triton")
    wide, eps, kept = case.plain(torch.float32), 4 * torch.finfo(dtype).eps, comparable(case, kind)
    for name, value in ours.items():  # PyTorch in fp32, rounded once: products that overflow in between are its own
        torch.testing.assert_close(value[kept], wide[name].to(dtype)[kept], rtol=eps, atol=eps, equal_nan=True)


def test_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match=r"backend: expected fp32 or fp16 in Triton's interpreter"):
        gated_activation(None, torch.zeros(4, 4, dtype=torch.bfloat16), "silu", backend="triton")
