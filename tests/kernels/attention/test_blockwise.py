"""Block by block in PyTorch: within the budget, for every feature beside every mask."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpeft_kernels.attention import autograd, blocks
from fastpeft_kernels.attention.masks import Mask

from .drawn import TRAINED, Case, assert_same, every_mask, gradients, hold, make_case

MASKS = tuple(every_mask(1, 1, 2, 2))
EXTRAS = ("softcap", "relative", "bias", "sinks", "dropout")
LARGE = {"batch": 2, "heads": 4, "queries": 70, "keys": 81}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blockwise(case: Case) -> tuple[Tensor, Tensor]:
    return autograd.apply(case.q, case.k, case.v, case.mask, case.scores, "blockwise", False)


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind: str, small_blocks: None, nan_filled: None) -> None:
    hold(make_case(**LARGE, mask=every_mask(**LARGE)[kind]), blockwise)


@pytest.mark.parametrize("kind", ("everything", *(pytest.param(kind, marks=pytest.mark.full) for kind in MASKS[:-1])))
def test_every_mask_with_all_extras(kind: str, small_blocks: None, nan_filled: None) -> None:
    hold(make_case(**LARGE, mask=every_mask(**LARGE)[kind], extras=EXTRAS), blockwise)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_extra_and_dtype(extra: str, dtype: torch.dtype, small_blocks: None, nan_filled: None) -> None:
    hold(make_case(**LARGE, mask=Mask(left=20, right=0), extras=[extra], dtype=dtype, v_features=20), blockwise)


@given(
    st.sampled_from(MASKS), st.sets(st.sampled_from(EXTRAS)), st.sampled_from(((1, 1), (2, 2), (3, 1), (4, 2))),
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(((16, 8, 128), (32, 16, 9999), (32, 16, 128, 20), blocks.CPU)),
)  # fmt: skip
@settings(max_examples=50)
def test_any_combination(
    kind: str, extras: set[str], heads: tuple[int, int], batch: int, queries: int, keys: int, features: int,
    v_features: int, sizes: tuple[int, ...],
) -> None:  # fmt: skip
    """In fp64: of errors as few as these the largest is chance."""
    torch.manual_seed(queries * 100 + keys)
    mask = every_mask(batch, heads[0], queries, keys)[kind]
    of_q, of_k = {"queries": queries, "features": features}, {"keys": keys, "v_features": v_features}
    case = make_case(batch, *heads, **of_q, **of_k, dtype=torch.float64, mask=mask, extras=sorted(extras))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU", blocks.Sizes(*sizes))
        assert_same(case, blockwise)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "one", "other"), [
    (kind, *pair) for kind in MASKS for pair in itertools.combinations(EXTRAS, 2)
])  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES[1:]), ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_pair(kind: str, one: str, other: str, dtype: torch.dtype, small_blocks: None) -> None:
    case = make_case(**LARGE, mask=every_mask(**LARGE)[kind], extras=[one, other], dtype=dtype)
    (assert_same if dtype == torch.float64 else hold)(case, blockwise)


@pytest.mark.parametrize("extras", ([], list(EXTRAS)))
def test_gradcheck(extras: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU", blocks.Sizes(2, 2, 4))
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 3, "keys": 5, "features": 3}
    case = make_case(**sizes, dtype=torch.float64, mask=Mask(right=0), extras=extras)
    names = list(case.inputs())

    def out(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        q, k, v = (named.pop(name) for name in ("q", "k", "v"))
        return blockwise(Case(q, k, v, case.mask, replace(case.scores, **named)))[0]

    torch.autograd.gradcheck(out, tuple(case.inputs().values()))


@pytest.mark.parametrize("wanted", [
    combination for n in (1, 5) for combination in itertools.combinations(("q", "k", "v", *TRAINED), n)
])  # fmt: skip
def test_only_what_is_wanted(wanted: tuple[str, ...], small_blocks: None) -> None:
    case = make_case(extras=TRAINED, mask=Mask(right=0))
    out, _ = blockwise(case)
    all_of_them = gradients(out, torch.ones_like(out), case.inputs())
    for name, x in case.inputs().items():
        x.requires_grad_(name in wanted)
    out, _ = blockwise(case)
    for name, grad in gradients(out, torch.ones_like(out), {name: case.inputs()[name] for name in wanted}).items():
        torch.testing.assert_close(grad, all_of_them[name], rtol=0, atol=0)


def test_any_layout(small_blocks: None) -> None:
    """Of the inputs and of the gradient that comes in."""
    case = make_case(mask=Mask(right=0))
    out, _ = blockwise(case)
    assert out.transpose(1, 2).is_contiguous()
    dout = torch.randn(out.shape)
    want = gradients(out, dout, case.inputs())
    qkv = torch.cat([x.detach().transpose(2, 3) for x in (case.k, case.v)], 2)
    other = Case(
        case.q.detach().contiguous().requires_grad_(),
        qkv[:, :, :16].mT.detach().requires_grad_(),
        qkv[:, :, 16:].mT.detach().requires_grad_(),
        case.mask,
        case.scores,
    )
    again, _ = blockwise(other)
    torch.testing.assert_close(again, out)
    strided = torch.stack([dout, dout], -1)[..., 0]
    torch.testing.assert_close(gradients(again, strided, other.inputs()), want)
    again, _ = blockwise(other)
    ones = gradients(again, torch.ones(()).expand(out.shape), other.inputs())
    torch.testing.assert_close(ones, gradients(blockwise(other)[0], torch.ones(out.shape), other.inputs()))


def test_padding_that_holds_nan_is_not_seen(small_blocks: None) -> None:
    """What stands at a key that nobody sees is never read, where whole blocks are padding."""
    case = make_case(mask=Mask(keys=(torch.arange(23) < 8).expand(2, 23)))
    out, _ = blockwise(case)
    with torch.no_grad():
        case.k[:, :, 16:], case.v[:, :, 16:] = torch.nan, torch.nan
    torch.testing.assert_close(blockwise(case)[0], out)


@pytest.mark.parametrize("extras", ([], list(EXTRAS)))
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_products_as_on_a_gpu(
    extras: list[str], dtype: torch.dtype, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sums in fp32, which this torch has on GPUs alone."""

    def wide(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == dtype
        return a.float() @ b.float()

    init = blocks.Blocks.__init__

    def on_gpu(self: blocks.Blocks, q: Tensor, *arguments: object) -> None:
        init(self, q, *arguments)
        self.factors = q.dtype

    monkeypatch.setattr(blocks, "wide_product", wide)
    monkeypatch.setattr(blocks.Blocks, "__init__", on_gpu)
    hold(make_case(**LARGE, mask=Mask(left=20, right=0), extras=extras, dtype=dtype), blockwise)


def test_a_second_derivative_is_refused() -> None:
    case = make_case()
    out, _ = blockwise(case)
    (grad,) = torch.autograd.grad(out.square().sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_write_before_backward_is_noticed() -> None:
    case = make_case(mask=Mask(keys=torch.ones(2, 23, dtype=torch.bool)))
    out, _ = blockwise(case)
    case.mask.keys[0, 0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
