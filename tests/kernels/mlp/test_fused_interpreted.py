"""The kernels that multiply by adapters' factors in the activation's pass, in Triton's interpreter, in fp16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.activation import KINDS
from tests.budget import assert_within_budget

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]
pytest.importorskip("triton")

F16 = torch.float16  # the interpreter computes bfloat16 wrongly
SHAPES = ((37, 50), (64, 64), (5, 19), (1, 1))  # nothing aligned; whole tiles; less than one; one element
UNALIGNED = (19, 35)  # two tiles a side, so that no pass takes long
RANKS = {"gate": 16, "up": 5, "down": 12}


def small(parts: int = 1) -> Any:
    """A tile that the interpreter can afford, so that there are several of each kind; four multiprocessors there."""
    from fastpeft_kernels.mlp.fused_tiles import Config

    return Config(16, 32, 1, 2, parts)


def halves(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    both = (2.0 * torch.randn(rows, 2 * columns)).to(F16)
    return both[:, :columns], both[:, columns:]


def matrix(rows: int, columns: int) -> Tensor:
    """As a part of wider memory."""
    return torch.randn(rows, columns + 3).to(F16)[:, :columns]


def hold(ours: Tensor, a: Tensor, b: Tensor, name: str) -> None:
    """`ours` is a @ b, within the budget of its dtype."""
    assert_within_budget(ours, (a.float() @ b.float()).to(ours.dtype), a.double() @ b.double(), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", (True, False), ids=("gated", "ungated"))
def test_forward(kind: str, gated: bool) -> None:
    for rows, columns in SHAPES if kind == "silu" else (UNALIGNED,):
        run_forward(*halves(rows, columns), kind, matrix(7, columns), small(), gated)


def test_forward_in_every_configuration() -> None:
    from fastpeft_kernels.mlp.fused_forward import CONFIGS

    for config in CONFIGS:
        run_forward(*halves(37, 150), "silu", matrix(150, 16).t(), config)


def run_forward(gate: Tensor, up: Tensor, kind: str, a: Tensor, config: Any, gated: bool = True) -> None:
    """h as the separate kernel has it, beside it nothing, S of it; in place the same."""
    from fastpeft_kernels.activation.forward import gated_activation_triton
    from fastpeft_kernels.mlp.fused_forward import gated_activation_with_down

    (rows, columns), given = up.shape, gate if gated else None
    wanted = torch.empty(rows, columns, dtype=F16)
    gated_activation_triton(given, up, kind, wanted)
    room = torch.full((rows, columns + 5), torch.nan, dtype=F16)
    h = room[:, :columns]
    s = gated_activation_with_down(given, up, kind, h, a, config=config)
    assert torch.equal(h, wanted)
    assert room[:, columns:].isnan().all(), "wrote beside h"
    hold(s, h, a.t(), f"S of {kind}")
    for place in (up, *([gate] if gated else [])):
        copy = torch.cat([gate, up], 1)
        gate_copy, up_copy = copy[:, :columns], copy[:, columns:]
        inside = up_copy if place is up else gate_copy
        again = gated_activation_with_down(gate_copy if gated else None, up_copy, kind, inside, a, config=config)
        assert torch.equal(inside, wanted)
        assert torch.equal(again, s)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", (True, False), ids=("gated", "ungated"))
def test_backward(kind: str, gated: bool) -> None:
    for (rows, columns), parts in zip(SHAPES, (1, 2, 2, 1), strict=True) if kind == "silu" else [(UNALIGNED, 2)]:
        run_backward(rows, columns, kind, small(parts), gated=gated)


def test_backward_in_every_configuration() -> None:
    from fastpeft_kernels.mlp.fused_backward import CONFIGS

    for config in CONFIGS:
        run_backward(37, 150, "silu", config)


@pytest.mark.parametrize("absent", range(1, 8))
def test_backward_without_some_adapters(absent: int) -> None:
    names = [name for bit, name in enumerate(RANKS) if not absent >> bit & 1]
    run_backward(*UNALIGNED, "silu", small(), names)
    run_backward(*UNALIGNED, "gelu", small(2), names, gated=False)


def run_backward(
    rows: int, columns: int, kind: str, config: Any, names: Any = tuple(RANKS), gated: bool = True
) -> None:
    """dgate and dup as the separate kernel has them, beside them nothing, the products of those; in place the same."""
    from fastpeft_kernels.activation.backward import gated_activation_backward_triton
    from fastpeft_kernels.lora.partial_sums import lora_sum
    from fastpeft_kernels.mlp.fused_backward import UpAdapter, gated_activation_backward_with_adapters

    gate, up = halves(rows, columns)
    given = gate if gated else None
    dh, h = matrix(rows, columns), torch.empty(rows, columns, dtype=F16)
    wanted_gate, wanted_up = torch.empty_like(h) if gated else None, torch.empty_like(h)
    gated_activation_backward_triton(dh, given, up, kind, wanted_gate, wanted_up, h)
    adapters = {
        name: UpAdapter(matrix(RANKS[name], columns).t(), matrix(rows, RANKS[name]))
        for name in ("gate", "up")
        if name in names and (gated or name == "up")
    }
    ds_down = matrix(rows, RANKS["down"]) if "down" in names else None

    def run(gate: Tensor | None, up: Tensor, dgate: Tensor | None, dup: Tensor) -> list[Tensor]:
        got = gated_activation_backward_with_adapters(
            dh, gate, up, kind, dgate=dgate, dup=dup, gate_adapter=adapters.get("gate"),
            up_adapter=adapters.get("up"), ds_down=ds_down, config=config,
        )  # fmt: skip
        present = ("gate" in adapters, "up" in adapters, ds_down is not None)
        assert [part is not None for part in got[1:]] == list(present)
        sums = [lora_sum(part, torch.empty(tuple(part.shape[1:]))) for part in got[1:] if part is not None]
        assert got.ds.shape == (rows, sum(RANKS[name] for name in adapters))
        return [got.ds, *sums]

    room = torch.full((rows, 2 * columns + 5), torch.nan, dtype=F16)
    dgate, dup = room[:, :columns] if gated else None, room[:, columns : 2 * columns]
    results = run(given, up, dgate, dup)
    assert torch.equal(dup, wanted_up)
    assert dgate is None or torch.equal(dgate, wanted_gate)
    assert room[:, 2 * columns :].isnan().all(), "wrote beside dup"

    ds, *sums = results
    at = 0
    for name, dy in (("gate", dgate), ("up", dup)):
        if dy is not None and name in adapters:
            b, s = adapters[name]
            hold(ds[:, at : at + RANKS[name]], dy, b, f"dS of {name}")
            hold(sums.pop(0), dy.t(), s, f"dB of {name}")
            at += RANKS[name]
    if ds_down is not None:
        hold(sums.pop(0), ds_down.t(), h, "dA of down")
    assert not sums

    both = torch.cat([gate, up], 1)
    gate, up = both[:, :columns] if gated else None, both[:, columns:]
    assert all(torch.equal(a, b) for a, b in zip(run(gate, up, gate, up), results, strict=True))
    assert torch.equal(up, wanted_up)
    assert gate is None or torch.equal(gate, wanted_gate)


def test_nothing() -> None:
    from fastpeft_kernels.mlp.fused_backward import UpAdapter, gated_activation_backward_with_adapters
    from fastpeft_kernels.mlp.fused_forward import gated_activation_with_down

    for rows, columns in ((0, 40), (40, 0)):
        gate, up = halves(rows, columns)
        s = gated_activation_with_down(gate, up, "silu", torch.empty_like(up), matrix(4, columns))
        assert torch.equal(s, torch.zeros(rows, 4, dtype=F16))
        adapter = UpAdapter(matrix(columns, 4), matrix(rows, 4))
        got = gated_activation_backward_with_adapters(
            up, gate, up, "silu", dgate=gate, dup=up, gate_adapter=adapter, up_adapter=adapter, ds_down=matrix(rows, 2)
        )
        assert torch.equal(got.ds, torch.zeros(rows, 8, dtype=F16))
        assert got.db_gate is not None and torch.equal(got.db_gate.sum(0), torch.zeros(columns, 4))
        assert got.da_down is not None and torch.equal(got.da_down.sum(0), torch.zeros(2, columns))


def test_refusals() -> None:
    from fastpeft_kernels.mlp.fused_backward import UpAdapter, gated_activation_backward_with_adapters
    from fastpeft_kernels.mlp.fused_forward import gated_activation_with_down

    gate, up = halves(8, 24)
    h, a = torch.empty_like(up), matrix(4, 24)
    good: dict[str, Any] = {"gate": gate, "up": up, "activation": "silu", "h": h, "a": a}
    for change, error, message in (
        ({"a": matrix(17, 24)}, ValueError, r"a.T: expected 24 vectors of 1 to 16 ranks, got shape \(24, 17\)"),
        ({"a": a.float()}, TypeError, r"a.T: expected the dtype of up, torch.float16, got torch.float32"),
        ({"activation": "swish"}, ValueError, r"activation: expected one of silu, gelu, .*, got 'swish'"),
        ({"gate": gate.contiguous()}, ValueError, r"gate and up: expected rows equally far apart"),
        ({"h": h[:4]}, ValueError, r"h: expected the shape of up, \(8, 24\), got \(4, 24\)"),
        ({"h": matrix(24, 8).t()}, ValueError, r"h: expected contiguous columns, got strides \(1, 11\)"),
        ({"gate": None, "up": up.float()}, TypeError, r"up: expected fp16 or bf16, got torch.float32"),
        ({"gate": None, "up": up.bfloat16()}, ValueError, r"up: expected fp16 in Triton's interpreter"),
    ):
        with pytest.raises(error, match=message):
            gated_activation_with_down(**{**good, **change})
    adapter = UpAdapter(matrix(24, 3), matrix(8, 3))
    good = {"dh": h, "gate": gate, "up": up, "activation": "silu", "dgate": gate, "dup": up}
    for change, error, message in (
        ({"dgate": None}, ValueError, r"dgate: expected a tensor as gate is, got None"),
        ({"dup": up.contiguous()}, ValueError, r"dgate and dup: expected rows equally far apart"),
        ({"gate": None, "dgate": None, "gate_adapter": adapter}, ValueError, r"gate_adapter: expected None without"),
        ({"up_adapter": UpAdapter(matrix(24, 3), matrix(8, 2))}, ValueError, r"up_adapter.s: expected a rank of 3"),
        ({"up_adapter": UpAdapter(matrix(8, 3), matrix(8, 3))}, ValueError, r"up_adapter.b: expected 24 vectors"),
        ({"ds_down": matrix(8, 17)}, ValueError, r"ds_down: expected 8 vectors of 1 to 16 ranks, got shape \(8, 17\)"),
    ):
        with pytest.raises(error, match=message):
            gated_activation_backward_with_adapters(**{**good, **change})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The MLP op takes the fused kernels in fp16; which of them it called."""
    from fastpeft_kernels.lora import Dtypes, keys
    from fastpeft_kernels.mlp import fused, fused_backward, fused_forward

    calls: list[str] = []

    def noted(module: Any, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **kw: calls.append(name) or function(*args, **kw, config=small())
        )

    noted(fused_forward, "gated_activation_with_down")
    noted(fused_backward, "gated_activation_backward_with_adapters")
    monkeypatch.setattr(keys, "kernels_serve", lambda device: True)
    monkeypatch.setattr(keys, "default_fused", lambda pre: "fused")
    monkeypatch.setattr(Dtypes, "for_input", lambda self, x: self)  # fp16 products stay so on this CPU
    assert fused.candidates(torch.device("cpu")) == ("apart", "fused")
    return calls


BOTH = ["gated_activation_with_down", "gated_activation_backward_with_adapters"]


@pytest.mark.parametrize("keep", ["preactivations", "input"])
@pytest.mark.parametrize(
    "layout, ranks, dropout, calls",
    [
        ("gate and up", ((4,), (3,), (5,)), 0.0, BOTH),
        ("gate and up", ((16,), (), (2,)), 0.0, BOTH),
        ("gate and up", ((4,), (3,), ()), 0.0, BOTH[1:]),
        ("up alone", ((4,), (5,)), 0.0, BOTH),
        ("gate and up", ((4,), (3,), (5,)), 0.25, []),  # what down reads is dropped
        ("both in one", ((4,), (5,)), 0.0, BOTH[:1]),
        ("gate and up", ((4, 2), (3,), (5,)), 0.0, BOTH[:1]),
        ("gate and up", ((17,), (3,), (5,)), 0.0, BOTH[:1]),
    ],
)
def test_within_the_mlp(layout: str, ranks: Any, dropout: float, calls: list[str], keep: str, taken: list[str]) -> None:
    from fastpeft_kernels.lora import Dtypes
    from tests.kernels.mlp.mlps import check_mlp, mlp

    m = mlp(layout, 24, 32, ranks=ranks, dtype=F16, lora_dtype=F16, dropout=dropout)
    check_mlp(torch.randn(21, 24).to(F16).requires_grad_(), m, Dtypes(F16, F16, F16), keep=keep)
    assert taken == calls
