"""Under torch.compile, selective checkpointing, and with tensors that have no values."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft_kernels.attention import Mask, attention, autograd, custom_op, packed
from fastpeft_kernels.attention.choosing import own_backend
from fastpeft_kernels.attention.layout import flatten
from tests.kernels.compiling import check_changing_sizes, check_one_graph, check_selective_checkpointing

from .drawn import TRAINED, Case, hold, make_case

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")
EXTRAS = ["softcap", *TRAINED]
CU_SEQLENS = torch.tensor([0, 5, 5, 17])


def ours(case: Case, q: Tensor, **more: Any) -> tuple[Tensor, ...]:
    return (attention(q, case.k, case.v, **(case.arguments() | more)),)


@pytest.mark.parametrize("backend", ("blockwise", pytest.param("auto", marks=pytest.mark.full)))
def test_one_graph(backend: str) -> None:
    case = make_case(mask=Mask(left=4, right=0), extras=EXTRAS)
    parameters = [x for name, x in case.inputs().items() if name != "q"]
    roundings = 64 if backend == "auto" else 0  # of so few an eager call makes all scores at once, a graph blocks
    check_one_graph(lambda q: ours(case, q, backend=backend), case.q, parameters, "aot_eager", roundings)


@pytest.mark.full
def test_one_graph_by_the_inductor() -> None:
    case = make_case(mask=Mask(left=4, right=0), extras=EXTRAS)
    parameters = [x for name, x in case.inputs().items() if name != "q"]
    check_one_graph(lambda q: ours(case, q, backend="blockwise"), case.q, parameters, "inductor")


def test_one_graph_in_16_bits() -> None:
    """As chosen, which asks what the processor can do, and may not while it is traced."""
    case = make_case(dtype=torch.bfloat16)
    with torch.no_grad():
        function = torch.compile(lambda q: ours(case, q), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(function(case.q), ours(case, case.q))


def test_masks_are_made_in_the_graph() -> None:
    case = make_case(queries=19, keys=19)

    def function(q: Tensor) -> tuple[Tensor, ...]:
        return ours(case, q, mask=packed(CU_SEQLENS, q.shape[2], window=(3, None)), backend="blockwise")

    check_one_graph(function, case.q, [case.k, case.v], "aot_eager")


def test_pytorchs_own_in_the_graph() -> None:
    for mask in (Mask(right=0), Mask(keys=torch.arange(19)[None] < torch.tensor([[19], [0]]))):
        case = make_case(queries=19, keys=19, mask=mask)
        check_one_graph(functools.partial(ours, case, backend="sdpa"), case.q, [case.k, case.v], "aot_eager")


@pytest.mark.full
def test_changing_sizes() -> None:
    """For PyTorch's own, and for ours."""

    def function(x: Tensor) -> Tensor:
        q = x.unflatten(2, (8, 8)).transpose(1, 2)
        return attention(q, q, q, mask=Mask(right=0)) + attention(q, q, q, mask=Mask(left=1, right=0))

    check_changing_sizes(function)


@pytest.mark.parametrize("saved", ("everything", "mul.Tensor"))
def test_selective_checkpointing(saved: str) -> None:
    case = make_case(mask=Mask(left=4, right=0), extras=EXTRAS)

    def block(q: Tensor) -> Tensor:
        return ours(case, q * 2.0, backend="blockwise")[0].sin()

    check_selective_checkpointing(block, case.q, [case.k, case.scores.relative], saved)


@pytest.mark.parametrize("extras", ([], [*EXTRAS, "dropout"]))
def test_the_ops_keep_their_word(extras: list[str]) -> None:
    case = make_case(extras=extras, mask=Mask(right=0, keys=torch.ones(1, 23, dtype=torch.bool)))
    trained = [getattr(case.scores, name) for name in TRAINED]
    flat = flatten(case.mask, case.scores)
    arguments = (case.q, case.k, case.v, *trained, *flat.tensors, *flat.numbers, "blockwise", False)
    torch.library.opcheck(custom_op.attention_op, arguments)


def test_without_values() -> None:
    case = make_case(mask=Mask(left=4, right=0), extras=["sinks", "softcap"])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in (case.q, case.k, case.v, case.scores.sinks)]
        out = attention(*fake[:3], sinks=fake[3], softcap=2.0, mask=case.mask)
    real = attention(case.q, case.k, case.v, **case.arguments())
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("right", (None, 0))
def test_ranges_that_are_causal_run_by_pytorchs_kernel(right: int | None) -> None:
    """A graph has ranges wherever positions may go back to 0; PyTorch's kernel takes them where these don't."""
    tokens = 40
    start, stop = torch.zeros(1, tokens, dtype=torch.int32), torch.arange(1, tokens + 1, dtype=torch.int32)[None]
    mask = Mask(right=right, start=start, stop=stop if right is None else torch.full_like(stop, tokens))
    case = make_case(queries=tokens, keys=tokens, features=16, mask=mask)
    assert own_backend(case.q, case.k, case.v, case.mask, case.scores) == "cpu"
    hold(case, lambda it: autograd.apply(it.q, it.k, it.v, it.mask, it.scores, "auto", False))
    check_one_graph(functools.partial(ours, case), case.q, [case.k, case.v], "aot_eager", 64)


def test_ranges_that_are_not_run_in_blocks() -> None:
    tokens = 40
    for mask in (
        packed(torch.tensor([0, 17, tokens], dtype=torch.int32), tokens),
        Mask(right=0, keys=torch.arange(tokens)[None] < 30),
        Mask(left=5, right=0),
        Mask(start=torch.zeros(1, tokens, dtype=torch.int32), stop=torch.full((1, tokens), tokens, dtype=torch.int32)),
    ):
        case = make_case(queries=tokens, keys=tokens, features=16, mask=mask)
        assert own_backend(case.q, case.k, case.v, case.mask, case.scores) == "blockwise"
    case = make_case(queries=tokens, keys=tokens, features=16, mask=Mask(right=0), extras=["softcap"])
    assert own_backend(case.q, case.k, case.v, case.mask, case.scores) == "blockwise"
