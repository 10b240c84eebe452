"""LoRA projections against fp64, over shapes, dtypes, adapters and what is trained."""

import pytest
import torch

from fastpeft_kernels.common.scratch import release_scratch
from fastpeft_kernels.lora import Dtypes, LoraProjection, lora_linear_group
from fastpeft_kernels.lora.reference import lora_group_reference
from fastpeft_kernels.weights import DenseWeight
from tests.kernels.lora.groups import adapter, check_group, parameters, projection, seeds_for, widened

pytestmark = pytest.mark.usefixtures("nan_filled")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SAME = {dtype: Dtypes(dtype, dtype, dtype) for dtype in (F32, F16, BF16)}


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_siblings_with_several_adapters_biases_and_a_bare_one(dtype, dropout):
    group = [
        projection(24, 40, 4, dtype=dtype, bias=True, scaling=0.5, dropout=dropout),
        projection(24, 16, 3, 8, dtype=dtype, scaling=2.0, dropout=dropout, with_bias=True),
        projection(24, 12, dtype=dtype),
        projection(24, 8, 1, dtype=dtype, scaling=-1.0),
    ]
    check_group(torch.randn(2, 9, 24).to(dtype).requires_grad_(), group, SAME[dtype])


@pytest.mark.parametrize(
    "dtypes", [Dtypes(BF16, F32, BF16), Dtypes(BF16, BF16, F32), Dtypes(F32, BF16, F32), Dtypes(F16, F32, F16)]
)
def test_mixed_dtypes(dtypes):
    x_dtype = F32 if dtypes.out == F32 else dtypes.compute
    group = [projection(24, 40, 4, dtype=dtypes.compute, lora_dtype=F32, bias=True, scaling=2.0) for _ in range(2)]
    check_group(torch.randn(5, 24).to(x_dtype).requires_grad_(), group, dtypes)


def test_fp32_adapters_on_a_bf16_base_stay_fp32_in_effect():
    group = [projection(64, 48, 8, dtype=BF16, lora_dtype=F32)]
    x = torch.randn(33, 64).to(BF16)
    (y,) = lora_linear_group(x, group)
    dy = torch.randn(33, 48).to(BF16)
    grads = torch.autograd.grad(y, parameters(group), dy)
    wide = [widened(group[0])]
    (y64,) = lora_group_reference(x.double(), wide, Dtypes(*[torch.float64] * 3), [None])
    for ours, truth in zip(grads, torch.autograd.grad(y64, parameters(wide), dy.double()), strict=True):
        assert (ours - truth).norm() <= 1e-5 * truth.norm()


def test_gradcheck_of_the_reference_and_of_the_op():
    group = [widened(projection(5, 4, 2, 3, bias=True, with_bias=True, dropout=0.3)), widened(projection(5, 3, 1))]
    if group[0].bias is not None:
        group[0].bias.requires_grad_()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *parameters(group))
    dtypes, seeds = Dtypes(*[torch.float64] * 3), seeds_for(group)
    assert torch.autograd.gradcheck(lambda x, *_: lora_group_reference(x, group, dtypes, seeds), inputs)
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear_group(x, group, seeds=seeds), inputs)


def test_outputs_are_no_views_and_can_be_written_in_place():
    group = [projection(12, 8, 2), projection(12, 6, 2)]
    x = torch.randn(3, 12, requires_grad=True)
    y, z = lora_linear_group(x, group)
    (y.clamp_(-1, 1).sum() + z.mul_(2).sum()).backward()
    y2, z2 = lora_group_reference(x.detach().requires_grad_(), group, SAME[F32], [None, None])
    torch.testing.assert_close(y, y2.clamp(-1, 1))
    torch.testing.assert_close(z, z2 * 2)


@pytest.mark.parametrize("autocast", [None, BF16])
def test_default_dtypes_follow_autocast_as_linear_does(autocast):
    p = projection(12, 8, 2)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        (y,) = lora_linear_group(torch.randn(3, 12), [p])
        assert y.dtype == torch.nn.functional.linear(torch.randn(3, 12), torch.randn(8, 12)).dtype
    y.float().sum().backward()
    assert all(t.grad.dtype == F32 for t in parameters([p]))


def test_a_seed_a_projection_in_order_and_only_with_dropout():
    torch.manual_seed(0)
    group = [projection(12, 8, 2, dropout=0.5), projection(12, 6, 2), projection(12, 4, 2, dropout=0.5)]
    x = torch.randn(3, 12)
    torch.manual_seed(1)
    together = lora_linear_group(x, group)
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    alone = [lora_linear_group(x, [p])[0] for p in group]
    assert torch.equal(after, torch.random.get_rng_state())
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(lora_linear_group(x, group, training=False)[0], lora_linear_group(x, group, training=False)[0])


def test_deterministic():
    group = [projection(32, 48, 4, dropout=0.1), projection(32, 16, 4)]
    x, seeds = torch.randn(64, 32, requires_grad=True), seeds_for(group)
    first, second = (
        torch.autograd.grad([y.sum() for y in lora_linear_group(x, group, seeds=seeds)], [x, *parameters(group)])
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_base_that_changes_before_backward_is_an_error():
    weight = torch.randn(8, 12)
    p = LoraProjection(DenseWeight(weight), None, (adapter(2, 12, 8),))
    (y,) = lora_linear_group(torch.randn(3, 12), [p])
    weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"frozen base weight \(8, 12\) was changed or moved between"):
        y.sum().backward()


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    p = projection(12, 8, 2)
    x = torch.randn(3, 12, requires_grad=True)
    (dx,) = torch.autograd.grad(lora_linear_group(x, [p])[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_weight_is_brought_and_released_around_every_use():
    log = []

    class Streamed(DenseWeight):
        def prefetch(self):
            log.append("prefetch")

        def ready(self, dtype):
            log.append("read")
            return super().ready(dtype)

        def decode(self, *args, **kwargs):
            log.append("read")
            return super().decode(*args, **kwargs)

        def release(self):
            log.append("release")

    p = LoraProjection(Streamed(torch.randn(8, 12)), None, (adapter(2, 12, 8),))
    lora_linear_group(torch.randn(3, 12, requires_grad=True), [p])[0].sum().backward()
    assert log == ["prefetch", "read", "release"] * 2


def test_a_weight_is_released_when_its_product_fails():
    log = []

    class Lost(DenseWeight):
        def ready(self, dtype):
            raise RuntimeError("the link is down")

        def release(self):
            log.append("release")

    p = LoraProjection(Lost(torch.randn(8, 12)), None, (adapter(2, 12, 8),))
    with pytest.raises(RuntimeError, match="the link is down"):
        lora_linear_group(torch.randn(3, 12), [p])
    assert log == ["release"]


def test_few_tokens_without_gradients_stay_in_16_bits(monkeypatch):
    """Generation: casting the weights would take longer than the products."""
    monkeypatch.setattr("fastpeft_kernels.common.device._slow_on_cpu", lambda dtype: True)
    for rows, grad, expected in ((1, False, BF16), (8, False, BF16), (9, False, F32), (1, True, F32)):
        with torch.set_grad_enabled(grad):
            assert SAME[BF16].for_input(torch.randn(rows, 12)).compute == expected


def test_a_default_device_changes_nothing():
    group = [projection(64, 48, 4)]
    x = torch.randn(5, 64)
    (expected,) = lora_linear_group(x, group)
    release_scratch()
    torch.set_default_device("meta")
    try:
        (found,) = lora_linear_group(x, group)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)


def test_the_gradient_of_x_is_contiguous():
    x = torch.randn(2, 5, 64, requires_grad=True)
    seen = []
    h = x * 1
    h.register_hook(lambda g: seen.append(g.is_contiguous()))
    sum(y.sum() for y in lora_linear_group(h, [projection(64, 48, 4), projection(64, 16, 4)])).backward()
    assert seen == [True]


def test_parameters_of_an_output_without_gradient_get_none():
    group = [projection(12, 8, 2), projection(12, 6, 3)]
    lora_linear_group(torch.randn(5, 12), group)[0].sum().backward()
    assert all(t.grad is not None for t in parameters(group[:1]))
    assert all(t.grad is None for t in parameters(group[1:]))
