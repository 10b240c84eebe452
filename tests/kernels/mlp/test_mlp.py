"""The whole MLP against fp64, over layouts, activations, dtypes, adapters and what is trained."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.lora import Dtypes, direct
from fastpeft_kernels.lora.api import draw_seeds
from fastpeft_kernels.mlp import Mlp, apart, library, lora_mlp
from fastpeft_kernels.mlp.api import run_mlp
from fastpeft_kernels.mlp.library import Middle
from fastpeft_kernels.mlp.reference import lora_mlp_reference
from fastpeft_kernels.native.extension import group_extension
from tests.kernels.lora.groups import parameters, projection
from tests.kernels.mlp.mlps import LAYOUTS, check_mlp, mixed, mlp, seeds_of, wide

pytestmark = pytest.mark.usefixtures("nan_filled")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SAME = {dtype: Dtypes(dtype, dtype, dtype) for dtype in (F32, F16, BF16)}


@pytest.mark.parametrize("keep", ["preactivations", "input"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_layout_with_bias_and_dropout(layout, dtype, keep):
    fields = {"dtype": dtype, "bias": True, "dropout": 0.25, "with_bias": True, "between": 0.4}
    m = mlp(layout, 32, 48, ranks=((4,), (3, 2), (5,)), **fields)
    check_mlp(torch.randn(4, 16, 32).to(dtype).requires_grad_(), m, SAME[dtype], keep=keep)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation(layout, activation):
    m = mlp(layout, 16, 24, activation=activation)
    check_mlp(torch.randn(11, 16).requires_grad_(), m, SAME[F32])


@pytest.mark.parametrize(
    "dtypes", [Dtypes(BF16, F32, BF16), Dtypes(BF16, BF16, F32), Dtypes(F32, BF16, F32), Dtypes(F16, F32, F16)]
)
def test_mixed_dtypes(dtypes):
    x_dtype = F32 if dtypes.out == F32 else dtypes.compute
    m = mlp("gate and up", 48, 96, dtype=dtypes.compute, lora_dtype=F32, bias=True)
    check_mlp(torch.randn(64, 48).to(x_dtype).requires_grad_(), m, dtypes)


@pytest.mark.parametrize("keep", ["preactivations", "input"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [SAME[F32], Dtypes(BF16, F32, BF16)])
def test_rows_with_adapters_of_their_own(layout, dtypes, keep):
    """Down lacks the first adapter and has another third; a row's adapter 7 is nobody's."""
    fields = {"dtype": dtypes.compute, "lora_dtype": dtypes.lora, "bias": True, "dropout": 0.25, "between": 0.3}
    m = mlp(layout, 32, 48, ranks=((4, 2, 3), (3, 2), (5, 2)), **fields)
    m = mixed(m, (2, 0, 7, 0, 1, 1))
    check_mlp(torch.randn(6, 64, 32).to(dtypes.compute).requires_grad_(), m, dtypes, keep=keep)


def check_in_parts(m, x, dtypes, monkeypatch):
    """As on a GPU."""
    assert not apart.serves(x, m, dtypes, [None] * 3), "a CPU has our own activation"
    monkeypatch.setattr(apart, "serves", lambda *_: True)
    check_mlp(x, m, dtypes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [SAME[F32], SAME[BF16], Dtypes(BF16, F32, BF16)])
@pytest.mark.parametrize("index", [None, (2, 7, 1)])
def test_small_ones_in_parts(layout, dtypes, index, monkeypatch):
    """As wide as it is because of few numbers the largest error is chance."""
    if index is None:
        m = mlp(layout, 96, 192, dtype=dtypes.compute, lora_dtype=F32, bias=True)
    else:
        m = mlp(layout, 96, 192, ranks=((4, 2, 3), (3, 2), (5, 2)), dtype=dtypes.compute, lora_dtype=F32, bias=True)
        m = mixed(m, index)
    check_in_parts(m, torch.randn(3, 64, 96).to(dtypes.compute).requires_grad_(), dtypes, monkeypatch)


@pytest.mark.parametrize("dtypes", [SAME[F32], SAME[BF16]])
def test_small_ones_in_parts_with_dropout_between(dtypes, monkeypatch):
    m = mlp("gate and up", 16, 24, dtype=dtypes.compute, lora_dtype=F32, between=0.4)
    check_in_parts(m, torch.randn(3, 64, 16).to(dtypes.compute).requires_grad_(), dtypes, monkeypatch)


def test_both_groups_are_asked_about_for_as_many_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(
        apart.direct, "fits", lambda x, group: asked.append((x.numel() // x.shape[-1], x.shape[-1])) or apart.direct.ALL
    )
    with FakeTensorMode():
        x = torch.empty(3, 5, 16, device="cuda")
        assert apart.serves(x, mlp("gate and up", 16, 24), SAME[F32], [None] * 3)
    assert asked == [(15, 16), (15, 24)]


@pytest.mark.skipif(group_extension(wait=True) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("frozen", [(), (0,), (3, 4)])
@pytest.mark.parametrize("keep", ["preactivations", "input"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [SAME[F32], SAME[BF16], Dtypes(BF16, F32, F32)])
def test_products_by_cpp_are_the_same_bits(layout, dtypes, keep, frozen, monkeypatch):
    """`frozen`: x, or parameters of the first projections."""
    m, taken = mlp(layout, 16, 24, dtype=dtypes.compute, lora_dtype=F32, between=0.4), []
    x, seeds = torch.randn(3, 5, 16).to(dtypes.out).requires_grad_(0 not in frozen), seeds_of(m)
    for i in frozen:
        if i:
            parameters(list(m.projections))[i - 3].requires_grad_(False)
    wanted = [t for t in (x, *parameters(list(m.projections))) if t.requires_grad]
    for name in ("project", "derive"):
        way = getattr(direct, name)
        monkeypatch.setattr(direct, name, lambda *a, way=way: taken.append(found := way(*a)) or found)

    def results():
        torch.manual_seed(0)
        y = run_mlp(x, m, dtypes, seeds, keep == "preactivations")
        return y.detach(), *torch.autograd.grad(y, wanted, torch.randn_like(y))

    ours = results()
    assert taken and None not in taken
    monkeypatch.setattr(direct, "group_extension", lambda: None)
    taken.clear()
    for a, b in zip(ours, results(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert set(taken) == {None}


def test_gradcheck_of_the_reference_and_of_the_op():
    m = wide(mlp("gate and up", 5, 4, bias=True, dropout=0.3, between=0.3))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs, dtypes = (x, *parameters(list(m.projections))), Dtypes(*[torch.float64] * 3)
    seeds = seeds_of(m)
    assert torch.autograd.gradcheck(lambda x, *_: lora_mlp_reference(x, m, dtypes, seeds), inputs)


@pytest.mark.parametrize("keep", ["preactivations", "input"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_backward_takes_no_memory_for_gradients_of_gate_and_up(layout, keep, monkeypatch):
    m = mlp(layout, 8, 12, dropout=0.3, between=0.3)
    x = torch.randn(5, 8, requires_grad=True)
    in_place = []

    def note(dh, gate, up, kind, dgate, dup, h):
        in_place.append(dup.data_ptr() == up.data_ptr())
        fill(dh, gate, up, kind, dgate, dup, h)

    fill = library.fill_gated_activation_backward
    monkeypatch.setattr(library, "fill_gated_activation_backward", note)
    y, wanted = lora_mlp(x, m, keep=keep), [x, *parameters(list(m.projections))]
    grads = [torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=more) for more in (True, True, False)]
    assert in_place == ([False, False, True] if keep == "preactivations" else [True] * 3)
    for others in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], others, strict=True))


def test_backward_twice_gives_the_same():
    m = mlp("gate and up", 8, 12)
    x = torch.randn(5, 8, requires_grad=True)
    y, wanted = lora_mlp(x, m), [x, *parameters(list(m.projections))]
    first = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, wanted, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("keep", ["preactivations", "input"])
def test_what_is_kept(keep):
    tokens, features, size = 32, 24, 40
    m = mlp("gate and up", features, size)
    x = torch.randn(tokens, features, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t):
        if not t.requires_grad or t.grad_fn is not None:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {t.untyped_storage().data_ptr() for t in parameters(list(m.projections))} | {x.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_mlp(x, m, keep=keep)
    numbers = sum(size for place, size in kept.items() if place not in own) // 4
    assert numbers == tokens * ((2 * size if keep == "preactivations" else 0) + 4 + 3 + 5)


def test_what_goes_to_the_down_projection_does_not_live_on(monkeypatch):
    seen = []
    project = Middle.project
    monkeypatch.setattr(Middle, "project", lambda self, lead: seen.append(weakref.ref(self.h)) or project(self, lead))
    y = lora_mlp(torch.randn(5, 8, requires_grad=True), mlp("gate and up", 8, 12))
    assert y.requires_grad and len(seen) == 1 and seen[0]() is None


@pytest.mark.parametrize("keep", ["preactivations", "input"])
def test_checkpointed_it_stops_before_the_down_projection(keep, monkeypatch):
    m = mlp("gate and up", 8, 12, dropout=0.25)
    x = torch.randn(5, 8, requires_grad=True)
    wanted = [x, *parameters(list(m.projections))]
    torch.manual_seed(3)
    expected = torch.autograd.grad(lora_mlp(x, m, keep=keep).sum(), wanted)
    calls = []
    project = Middle.project
    monkeypatch.setattr(Middle, "project", lambda self, lead: calls.append(1) or project(self, lead))
    torch.manual_seed(3)
    y = x + checkpoint(lambda x: lora_mlp(x, m, keep=keep), x, use_reentrant=False)
    found = torch.autograd.grad((y - x).sum(), wanted)
    assert len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    y = checkpoint(lambda x: lora_mlp(x, m, keep=keep).sin(), x, use_reentrant=False)  # reads the result
    torch.autograd.grad(y.sum(), wanted)
    assert len(calls) == 3


def test_nothing_is_kept_for_what_is_not_trained():
    """Only down's b is, as in LoRA-FA: neither x nor the preactivations are read."""
    m = mlp("gate and up", 24, 40)
    for t in parameters(list(m.projections)):
        t.requires_grad_(t is m.down.adapters[0].b)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = lora_mlp(torch.randn(100, 24), m)
    assert max(sizes) <= 100 * 5
    y.sum().backward()
    assert m.down.adapters[0].b.grad is not None


@pytest.mark.parametrize("grad", [True, False])
def test_the_result_may_be_written_into(grad):
    """A residual that is added in place, or dropout in place, as some models have it."""
    m, x = mlp("gate and up", 32, 48), torch.randn(2, 3, 32, requires_grad=True)
    with torch.set_grad_enabled(grad):
        expected = lora_mlp(x, m) + x
        y = lora_mlp(x, m)
        y += x
    assert torch.equal(y, expected)
    if grad:
        wanted = [x, *parameters(list(m.projections))]
        ours, theirs = (torch.autograd.grad(z.sum(), wanted) for z in (y, expected))
        assert all(map(torch.equal, ours, theirs))


def test_a_base_that_changed_is_refused():
    m = mlp("gate and up", 8, 12)
    y = lora_mlp(torch.randn(3, 8), m)
    m.down.weight.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("keep", ["preactivations", "input"])
def test_the_host_reads_no_number(keep, monkeypatch):
    """On the meta device there is none to read: what a CUDA graph records must not depend on one."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    with torch.device("meta"):
        scaling = torch.tensor(0.5)
        m = mlp("gate and up", 32, 48, ranks=((4,), (3, 2), (5,)), bias=True, dropout=0.25, scaling=scaling)
        x = torch.randn(4, 16, 32, requires_grad=True)
        seeds = draw_seeds(x.device, m.projections, training=True)
        y = run_mlp(x, m, Dtypes(*[torch.float32] * 3), seeds, keep == "preactivations")
        y.sum().backward()
    assert y.is_meta and all(t.grad is not None for t in (x, *parameters(list(m.projections))))


def test_bad_arguments_name_what_is_wrong():
    x, good = torch.randn(3, 8), mlp("gate and up", 8, 12)
    cases = [
        (ValueError, "keep: expected one of preactivations, input, got 'all'", lambda: lora_mlp(x, good, keep="all")),
        (
            ValueError,
            "activation: expected one of .*, got 'swish'",
            lambda: lora_mlp(x, Mlp(good.inner, good.down, "swish")),
        ),
        (
            ValueError,
            r"down: expected as many inputs as gate and up have outputs each, got 13 inputs, outputs \[12, 12\]",
            lambda: lora_mlp(x, Mlp(good.inner, projection(13, 8), "silu")),
        ),
        (TypeError, "mlp: expected a Mlp, got NoneType", lambda: lora_mlp(x, None)),
        (
            TypeError,
            "mlp.down: expected a LoraProjection, got NoneType",
            lambda: lora_mlp(x, Mlp(good.inner, None, "silu")),
        ),
        (
            ValueError,
            r"adapter_index: expected a number for each row of x .*, got 2 for x of shape \(3, 8\)",
            lambda: lora_mlp(x, replace(good, adapter_index=(0, 1))),
        ),
        (TypeError, "projections: expected a list or tuple", lambda: lora_mlp(x, Mlp(None, good.down, "silu"))),
        (ValueError, "x: expected last size 8", lambda: lora_mlp(torch.randn(3, 9), good)),
        (TypeError, "x: expected a floating tensor", lambda: lora_mlp(torch.ones(3, 8, dtype=torch.int64), good)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
