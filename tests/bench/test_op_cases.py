"""The cases of every op: who computes one computes the same, and the floors are those of the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft.bench.left_out import NotHereError
from fastpeft.bench.ops import (
    activation,
    attention,
    attention_kinds,
    attention_peers,
    cross_entropy,
    distillation,
    embedding,
    experts,
    loss,
    lycoris,
    making,
    norm,
    preference,
    rope,
    tokens,
)
from fastpeft.bench.ops.case import DIRECTIONS, Floor, Inputs, OpCase
from fastpeft.bench.ops.checking import results, truth
from fastpeft.bench.ops.models import Shape
from fastpeft_kernels.common.budget import OverBudgetError

F32 = torch.float32
TINY = Shape("tiny", hidden=32, intermediate=64, heads=4, kv_heads=2, head_dim=16, vocab=300)
KINDS = (
    *(attention_kinds.CAUSAL, attention_kinds.PADDED, attention_kinds.DOCUMENTS, attention_kinds.SOFTCAP),
    *(attention_kinds.PADDED_CAUSAL, attention_kinds.HOLES),
    *(attention_kinds.RELATIVE, attention_kinds.BIAS, attention_kinds.window(9), attention_kinds.window(5, both=True)),
)
MODULES = (
    *(activation, attention, cross_entropy, distillation, embedding, experts, loss, lycoris, norm, preference, rope),
    tokens,
)


def rows(kind: attention_kinds.Kind) -> int:
    return 1 if kind.documents else 2


CASES: list[OpCase] = [
    *(attention.case(TINY, kind, rows(kind), 48, F32) for kind in KINDS),
    *(loss.case(TINY, 24, F32, head) for head in loss.HEADS),
    cross_entropy.case(TINY, 24, F32),
    *(distillation.case(TINY, TINY, 24, F32, *way) for way in (("forward KL", False), ("JSD", True))),
    preference.case(TINY, 2, 9, F32),
    *(norm.case(TINY, form, 24, 32, F32, trained) for form, trained in (("Llama", False), ("Gemma", True))),
    norm.case(TINY, "LayerNorm", 24, 32, F32, True),
    rope.case(TINY, 2, 9, F32),
    activation.case(TINY, 24, F32),
    activation.case(TINY._replace(activation="gelu", gated=False), 24, F32),
    embedding.case(TINY, 24, 4, F32),
    tokens.case(TINY, 24, 4, F32),
    *(lycoris.case(TINY, kind, 24, 4, F32) for kind in ("LoHa", "LoKr")),
    experts.case(experts.Mixture("tiny", 32, 24, 4, 2), 24, 4, F32),
]
NEED_A_GPU = {"sdpa efficient", "sdpa cudnn", "flex", "flash-attn", "liger", "liger on copies", "cut cross-entropy"}
LOSSES = {"loss", "cross_entropy", "distillation", "preference"}
COMPILED, SLOW_TO_IMPORT = "torch.compile", "trl"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_all_who_run_on_a_cpu_compute_the_case(case: OpCase) -> None:
    inputs = case.make("cpu", F32, 3)
    true = truth(case, inputs, "cpu", 3)
    assert next(iter(case.peers)) == "fastpeft"
    for name, peer in case.peers.items():
        if name in (COMPILED, SLOW_TO_IMPORT):
            continue
        try:
            forward = peer(inputs)
        except NotHereError as error:
            assert name != "fastpeft" and str(error)
            if name in NEED_A_GPU:
                assert str(error) == "needs a GPU" or any(word in str(error) for word in ("knows no", "has no"))
            continue
        assert name not in NEED_A_GPU
        for _ in range(2):  # each call starts afresh
            true.deviation(results(forward, inputs))


@pytest.mark.full
@pytest.mark.parametrize("peer", [COMPILED, SLOW_TO_IMPORT])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_those_who_take_long_compute_the_case(case: OpCase, peer: str) -> None:
    torch.compiler.reset()
    inputs = case.make("cpu", F32, 3)
    if peer in case.peers and not (peer == SLOW_TO_IMPORT and "a" in inputs.tensors):
        truth(case, inputs, "cpu", 3).deviation(results(case.peers[peer](inputs), inputs))


def test_a_loss_of_one_number_is_held_in_the_dtype_of_its_inputs() -> None:
    """PyTorch's own errs by 5e-7 here by chance, in a loss of 7.6 from inputs of 8 bits."""
    sizes = TINY._replace(hidden=64, vocab=1000)
    case = loss.case(sizes, 96, torch.bfloat16, "LoRA")
    inputs = case.make("cpu", torch.bfloat16, 1)
    true = truth(case, inputs, "cpu", 1)
    found = results(case.peers["fastpeft"](inputs), inputs)
    assert found[0].dtype == torch.float32
    true.deviation(found)
    with pytest.raises(OverBudgetError, match="result 0: "):
        true.deviation([found[0] * 1.02, *found[1:]])
    with pytest.raises(AssertionError, match="expected the dtype of plain PyTorch"):
        true.deviation([found[0].double(), *found[1:]])


def test_a_peer_that_is_not_installed_is_not_here() -> None:
    with pytest.raises(NotHereError, match="no_such_package does not import: No module named 'no_such_package'"):
        making.package("no_such_package.kernels")
    with pytest.raises(NotHereError, match="needs a GPU"):
        making.package("torch", Inputs({"x": torch.ones(1)}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_cases_of_real_models(module: Any, device: str) -> None:
    every = {depth: list(module.cases(device, depth)) for depth in ("quick", "default", "full")}
    for cases in every.values():
        names = [(case.name, case.dtype) for case in cases]
        assert names and len(set(names)) == len(names)
        assert {case.op for case in cases} == {module.__name__.rpartition(".")[2]}
        for case in cases:
            assert set(case.floors) == {"both"} if case.op in LOSSES else set(case.floors) == set(DIRECTIONS)
            alone = [case.floors[way] for way in DIRECTIONS[:2] if way in case.floors] or [case.floors["both"]]
            assert case.floors["both"].flops == sum(floor.flops for floor in alone)
            assert 0 < max(floor.bytes for floor in alone) <= case.floors["both"].bytes
            assert case.floors["both"].bytes <= sum(floor.bytes for floor in alone)
    shallow, usual, deep = ({case.name for case in cases} for cases in every.values())
    assert shallow <= usual <= deep


def test_the_floor_of_causal_attention_by_hand() -> None:
    """3 tokens: 6 pairs a head, 4 heads of 16 features that read 2 heads of keys; 4 bytes a number."""
    floors = attention.case(TINY, attention_kinds.CAUSAL, 1, 3, F32).floors
    queries, keys = 3 * 4 * 16 * 4, 3 * 2 * 16 * 4
    assert floors["forward"] == Floor(2 * (2 * 6 * 4 * 16), queries + 2 * keys + queries)
    assert floors["backward"] == Floor(4 * (2 * 6 * 4 * 16), queries + 2 * (queries + 2 * keys))
    assert floors["both"] == Floor(6 * (2 * 6 * 4 * 16), 4 * queries + 4 * keys)


def test_the_floor_of_a_loss_by_hand() -> None:
    """24 tokens of 32 features, 300 words, 4 bytes a number and 8 a label: a product has 24 x 32 x 300 x 2."""
    hidden, weight, labels = 24 * 32 * 4, 300 * 32 * 4, 24 * 8
    once = hidden + weight + labels + 4
    frozen, trained = (loss.case(TINY, 24, F32, head).floors["both"] for head in ("frozen", "trained"))
    assert frozen == Floor(2 * 460_800, once + 4 + hidden)
    assert trained == Floor(3 * 460_800, once + 4 + hidden + weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_pairs_of_the_floor_are_those_of_the_mask(kind: attention_kinds.Kind) -> None:
    from fastpeft_kernels.attention.masks import dense_mask

    seen = dense_mask(kind.mask(rows(kind), 48, "cpu"), 48, 48, torch.device("cpu"))
    everything = torch.ones((rows(kind), 1, 48, 48), dtype=torch.bool)
    assert kind.pairs(rows(kind), 48) == int((everything if seen is None else everything & seen).sum())


@pytest.mark.parametrize("kind", [attention_kinds.PADDED, attention_kinds.RELATIVE], ids=lambda kind: kind.name)
def test_the_oracle_in_blocks_is_the_oracle(kind: attention_kinds.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention.case(TINY, kind, 2, 48, F32).make("cpu", torch.float64, 0)
    whole = results(attention_peers.eager(inputs), inputs)
    monkeypatch.setitem(attention_peers._MOST_SCORES, torch.float64, 2 * 4 * 48 * 7)
    for one, other in zip(results(attention_peers.eager(inputs), inputs), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("always", [True, False])
def test_who_writes_over_inputs_gets_copies(always: bool) -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    made: list[int] = []

    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, given: Tensor) -> Tensor:
            ctx.given, y = given, 3 * given
            made.append(given.data_ptr())
            if always:
                given.data.zero_()
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            ctx.given.data.fill_(7.0)
            return 3 * dy

    def function(x: Tensor) -> Sequence[Tensor]:
        return (Spoils.apply(x),)  # type: ignore[return-value]

    forward: Callable[[], Sequence[Tensor]] = making.on_copies(function, ("x",), always)(Inputs({"x": x}, (x,)))
    for _ in range(2):
        (y,) = forward()
        assert y.tolist() == [3.0, 6.0] and x.tolist() == [1.0, 2.0]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [3.0, 3.0]
    assert x.data_ptr() not in made
