"""DoRA: gains over the outputs of a projection, against fp64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft_kernels.lora import Dtypes, LoraProjection, lora_linear_group
from fastpeft_kernels.lora.reference import lora_group_reference
from fastpeft_kernels.mlp import Mlp, lora_mlp
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.allocations import largest
from tests.kernels.lora.drawn import MANY_TOKENS, normal, projections
from tests.kernels.lora.groups import adapter, check_group, parameters, projection, seeds_for, widened
from tests.kernels.lora.test_properties import DTYPES, LOW_RANKS, Group, check_within_budget, groups, triples

pytestmark = pytest.mark.usefixtures("nan_filled")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ALL64 = Dtypes(F64, F64, F64)


def with_magnitude(out: st.SearchStrategy[int], ranks: st.SearchStrategy[int]) -> object:
    """Projections of which most have one adapter and a magnitude."""
    gained = st.sampled_from(["trained", "trained", "frozen", "none"])
    return projections(out, ranks, most=1, magnitude=gained)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_siblings_with_and_without_magnitude(dtype, dropout):
    group = [
        projection(24, 40, 4, dtype=dtype, bias=True, magnitude=True, scaling=0.5, dropout=dropout),
        projection(24, 16, 3, 8, dtype=dtype, dropout=dropout, with_bias=True),
        projection(24, 12, 2, dtype=dtype, magnitude=True),
    ]
    check_group(torch.randn(2, 33, 24).to(dtype).requires_grad_(), group, Dtypes(dtype, dtype, dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("in_16_bits", [False, True], ids=["", "products in 16 bits on any CPU"])
@pytest.mark.parametrize("dtypes", [Dtypes(BF16, F32, BF16), Dtypes(BF16, BF16, F32), Dtypes(F32, BF16, F32)])
def test_mixed_dtypes(dtypes, dropout, in_16_bits, monkeypatch):
    if in_16_bits:
        monkeypatch.setattr("fastpeft_kernels.lora.projection.product_dtype", lambda dtype, device: dtype)
    x_dtype = F32 if dtypes.out == F32 else dtypes.compute
    fields = {"lora_dtype": F32, "bias": True, "magnitude": True, "scaling": 2.0, "dropout": dropout}
    group = [projection(24, 40, 4, dtype=dtypes.compute, **fields) for _ in range(2)]
    check_group(torch.randn(65, 24).to(x_dtype).requires_grad_(), group, dtypes)


def test_gradcheck_of_the_reference_and_of_the_op():
    """With constant norms: `b` of the norm is detached, so only x, the magnitude and the bias have true derivatives."""
    p = widened(projection(5, 4, 2, bias=True, magnitude=True, dropout=0.3))
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    p.bias.requires_grad_()
    for tensor in (p.adapters[0].a, p.adapters[0].b):
        tensor.requires_grad_(False)
    seeds, inputs = seeds_for([p]), (x, p.bias, p.magnitude)
    assert torch.autograd.gradcheck(lambda x, *_: lora_group_reference(x, [p], ALL64, seeds), inputs)
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear_group(x, [p], seeds=seeds), inputs)


BUDGETED = {"case": groups(LOW_RANKS, (16, 48), MANY_TOKENS, with_magnitude), "dtypes": st.sampled_from(DTYPES)}


@settings(max_examples=6)
@given(**BUDGETED)
def test_within_the_budget(case: Group, dtypes: Dtypes) -> None:
    check_within_budget(case, dtypes)


@pytest.mark.full
@settings(max_examples=60)
@given(**BUDGETED)
def test_many_within_the_budget(case: Group, dtypes: Dtypes) -> None:
    check_within_budget(case, dtypes, repeats=20)


def check_in_fp64(case: Group, **options: object) -> None:
    """Of few numbers two roundings cannot be compared; in fp64 there is next to none, and a wrong term shows."""
    torch.manual_seed(case.seed)
    for i, (ours, _, exact) in enumerate(triples(case, normal, ALL64, **options)):
        assert (ours is None) == (exact is None), i
        if ours is not None and exact is not None and exact.numel():
            assert (ours - exact).abs().max() <= 1e-9 * exact.abs().max(), (i, ours, exact)


@settings(max_examples=25)
@given(case=groups(LOW_RANKS, (1, 48), part=with_magnitude))
def test_any_size(case: Group) -> None:
    check_in_fp64(case)


@pytest.mark.full
@settings(max_examples=1000)
@given(case=groups(part=with_magnitude))
def test_many_sizes(case: Group) -> None:
    check_in_fp64(case)


def test_what_is_kept_and_how_often_the_weight_is_decoded(monkeypatch):
    calls, kept = [], {}
    decode = FourBitWeight.decode
    monkeypatch.setattr(FourBitWeight, "decode", lambda *args, **kw: calls.append(1) or decode(*args, **kw))
    weight = FourBitWeight(encode_4bit(torch.randn(48, 64)))
    group = [LoraProjection(weight, None, (adapter(4, 64, 48),), torch.rand(48, requires_grad=True)) for _ in range(2)]
    group[1].magnitude.requires_grad_(False)
    x = torch.randn(128, 64, requires_grad=True)

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = lora_linear_group(x, group)
    for tensor in (*parameters(group), group[1].magnitude):
        kept.pop(tensor.untyped_storage()._cdata)
    z, norms, s = 4 * 128 * 48, 4 * 48, 4 * 128 * 4
    assert sum(kept.values()) == x.nbytes + z + 2 * (norms + s) and len(calls) == 2
    sum(y.sum() for y in ys).backward()
    assert len(calls) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_matrix_of_the_weight_s_size_is_made(dropout):
    """Over a dense base, of which nothing is decoded: the norms are made by blocks of rows."""
    out_features, in_features = 2048, 512
    group = [projection(in_features, out_features, 4, magnitude=True, dropout=dropout)]
    x = torch.randn(3, in_features, requires_grad=True)
    found = largest(lambda: lora_linear_group(x, group)[0].sum().backward())
    assert 0 < found <= out_features * in_features * 4 // 4


def test_nothing_is_kept_without_gradients():
    group, x = [projection(24, 16, 2, bias=True, magnitude=True)], torch.randn(5, 24)
    with torch.no_grad():
        (y,) = lora_linear_group(x, group)
    torch.testing.assert_close(y, lora_group_reference(x, group, Dtypes(F32, F32, F32), [None])[0])


def test_a_magnitude_that_does_not_fit_is_refused():
    p, x = projection(12, 8, 2, magnitude=True), torch.randn(3, 12)
    cases = [
        (
            replace(p, magnitude=torch.ones(7)),
            ValueError,
            r"projections\[0\].magnitude: expected shape \(8,\), got \(7,\)",
        ),
        (replace(p, magnitude=torch.ones(8).int()), TypeError, "magnitude: expected a floating dtype, got torch.int32"),
        (replace(p, adapters=()), ValueError, "magnitude: expected one adapter without bias, got 0, 0 with bias"),
        (replace(p, adapters=p.adapters * 2), ValueError, "magnitude: expected one adapter without bias, got 2"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            lora_linear_group(x, [wrong])
    with pytest.raises(ValueError, match="adapter_index: expected projections without magnitude in a mixed batch"):
        lora_linear_group(x, [p], adapter_index=[0, 0, 0])
    with pytest.raises(ValueError, match="mlp: expected projections without magnitude"):
        lora_mlp(x, Mlp((p,), projection(8, 12, 2), "silu"))
