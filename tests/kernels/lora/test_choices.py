"""Measured choices of a group: each way is right, is taken when it won, and keeps for backward what the others keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.lora import LoraProjection, apart, extended, keys, lora_linear_group, problems
from fastpeft_kernels.lora.keys import BACKWARD, FORWARD, GROUP, GroupKey
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.tuning import choosing, measuring
from fastpeft_kernels.tuning.measuring import measure
from fastpeft_kernels.tuning.records import Winner
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.lora.groups import adapter, parameters, projection

CPU = torch.device("cpu")
F32 = ("float32", "float32", "float32")
QKV = GroupKey(32, 64, (64, 32, 32), (8, 0, 16), ("float32",) * 3, *F32, False, "")
PROBLEMS = {tunable.op: tunable for tunable in problems.TUNABLES}


def win(key: GroupKey, **choices: str) -> None:
    fields: dict[str, Any] = {n: list(v) if isinstance(v, tuple) else v for n, v in key._asdict().items()}
    for op, choice in choices.items():
        choosing.learn(CPU, Winner(op, fields, choice, {choice: 1.0}))


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that are gone, in order."""
    gone: list[str] = []
    for module in (apart, extended):
        for name in ("forward_into", "backward_without_input"):
            function = getattr(module, name)

            def spy(*args: Any, name: str = name, module: Any = module, function: Any = function) -> Any:
                gone.append(f"{module.__name__.rpartition('.')[2]} {name.partition('_')[0]}")
                return function(*args)

            monkeypatch.setattr(module, name, spy)
    return gone


@pytest.mark.parametrize("dropout", (False, True))
@pytest.mark.parametrize("base", ("float32", "four_bit", "bfloat16"))
@pytest.mark.parametrize("layout", ("", "side by side", "room"))
def test_both_ways_are_right_and_timed(layout: str, base: str, dropout: bool, ways: list[str]) -> None:
    key = QKV._replace(bases=(base,) * 3, layout=layout, dropout=dropout)
    if layout == "room":
        key = key._replace(out_features=(64,), ranks=(8,), bases=(base,))
    for op in (FORWARD, BACKWARD) if layout != "room" else (FORWARD,):
        found = measure(PROBLEMS[op], key, CPU, seconds=0.0)
        assert not found.dropped and found.winner is not None
        assert found.winner.case == key and found.winner.us.keys() == {"apart", "extended"}
        direction = op.rpartition("_")[2]
        assert ways.count(f"apart {direction}") >= 8 and ways.count(f"extended {direction}") >= 8


@pytest.mark.parametrize("forward", ("apart", "extended"))
@pytest.mark.parametrize("backward", ("apart", "extended"))
@pytest.mark.parametrize("four_bit", (False, True))
def test_the_winner_is_taken(forward: str, backward: str, four_bit: bool, ways: list[str]) -> None:
    group = [projection(64, out, 8) for out in (64, 32)]
    if four_bit:
        group = [replace(p, weight=FourBitWeight(encode_4bit(p.weight.decode()))) for p in group]
    bases = ("four_bit" if four_bit else "float32",) * 2
    key = GroupKey(32, 64, (64, 32), (8, 8), bases, *F32, False, "")
    win(key, **{FORWARD: forward, BACKWARD: backward})
    x = torch.randn(30, 64, requires_grad=True)  # of the bucket of 32 tokens
    sum(y.sum() for y in lora_linear_group(x, group)).backward()
    assert ways == [f"{forward} forward", f"{backward} backward"]


def test_a_winner_that_cannot_be_taken_is_not(ways: list[str]) -> None:
    """Adapters in another dtype than the products of the base have products of their own."""
    group = [projection(64, 32, 8, lora_dtype=torch.float64)]
    with choosing.forced({FORWARD: "extended"}):
        lora_linear_group(torch.randn(4, 64), group)
    assert ways == ["apart forward"]


def test_an_infinity_of_one_sibling_shows_in_others_one_way_only() -> None:
    """What docs/how-to/tune.md warns of."""
    group = [projection(64, out, 8) for out in (64, 32)]
    with torch.no_grad():
        group[0].adapters[0].a[0, 0] = float("inf")
    other = {}
    for way in keys.ways(CPU):
        with choosing.forced({FORWARD: way}):
            other[way] = lora_linear_group(torch.randn(4, 64), group)[1]
    assert other["apart"].isfinite().all() and other["extended"].isnan().all()


def kept(run: Any) -> list[tuple[torch.Size, torch.dtype]]:
    found: list[tuple[torch.Size, torch.dtype]] = []

    def pack(t: Tensor) -> Tensor:
        found.append((t.shape, t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return found


def test_the_ways_keep_the_same() -> None:
    group = [projection(64, out, 8, dropout=0.1) for out in (64, 32)]
    x = torch.randn(32, 64, requires_grad=True)
    found = []
    for way in keys.ways(CPU):
        with choosing.forced({FORWARD: way}):
            found.append(kept(lambda: lora_linear_group(x, group)))
    assert found[0] == found[1] != []


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_recomputation_may_choose_otherwise(reentrant: bool) -> None:
    group = [projection(64, out, 8, dropout=0.1) for out in (64, 32)]
    x = torch.randn(32, 64, requires_grad=True)
    gradients = []
    for later in ("apart", "extended"):
        torch.manual_seed(0)
        with choosing.forced({FORWARD: "apart"}):
            ys = checkpoint(lambda x: lora_linear_group(x, group), x, use_reentrant=reentrant)
        with choosing.forced({FORWARD: later, BACKWARD: later}):
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        gradients.append([t.grad for t in (x, *parameters(group))])
        for t in (x, *parameters(group)):
            t.grad = None
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other)


def test_our_kernels_are_no_candidate_on_a_cpu() -> None:
    key = GroupKey(4, 64, (32,), (8,), ("float32",), *F32, False, "")
    win(key, **{GROUP: "triton"})
    lora_linear_group(torch.randn(4, 64, requires_grad=True), [projection(64, 32, 8)])
    assert keys.paths(CPU) == ("library",)


@pytest.mark.interpreter
@pytest.mark.parametrize("dropout", (False, True))
def test_our_kernels_are_right_and_keep_what_the_library_keeps(dropout: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_path = pytest.importorskip("fastpeft_kernels.lora.triton_path")
    ours: list[int] = []
    forward = triton_path.forward
    monkeypatch.setattr(triton_path, "forward", lambda *args: ours.append(1) or forward(*args))
    monkeypatch.setattr(measuring, "interleaved_us", lambda functions, *_: {name: [1.0] * 4 for name in functions})
    monkeypatch.setattr("fastpeft_kernels.lora.api.paths", lambda _: ("library", "triton"))
    key = GroupKey(16, 32, (16, 16), (8, 8), ("float32",) * 2, *F32, dropout, "")
    found = measure(replace(PROBLEMS[GROUP], candidates=lambda _: ("library", "triton")), key, CPU, seconds=0.0)
    assert not found.dropped and found.winner is not None and found.winner.us.keys() == {"library", "triton"}
    group = [projection(32, 16, 8, dropout=0.1 * dropout) for _ in range(2)]
    x = torch.randn(16, 32, requires_grad=True)
    both = []
    for choice in ("library", "triton"):
        ours.clear()
        win(key, **{GROUP: choice})
        both.append(kept(lambda: lora_linear_group(x, group)))
        assert len(ours) == (choice == "triton")
    assert both[0] == both[1] != []


def test_a_key_tells_what_decides() -> None:
    base = FourBitWeight(encode_4bit(torch.randn(48, 64)))
    group = [LoraProjection(base, None, (adapter(3, 64, 48), adapter(20, 64, 48))), projection(64, 16)]
    dtypes, seeds = problems.Dtypes(*[torch.float32] * 3), [torch.tensor([1]), None]
    key = keys.group_key(problems.Group(group, dtypes, seeds), 100, "room")
    assert key == GroupKey(128, 64, (48, 16), (32, 0), ("four_bit", "float32"), *F32, True, "room")
    assert key.at(5, CPU).tokens == 8 and str(key) == "128x64x48+16, r=32, four_bit, float32, dropout, room"
