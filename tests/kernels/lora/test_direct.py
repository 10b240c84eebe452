"""Groups by C++: the bits of the library's way through Python, its errors, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.lora import Dtypes, LoraProjection, autograd, direct, parts
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.native.extension import group_extension
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.tuning import choosing
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.lora.groups import parameters, projection

pytestmark = pytest.mark.skipif(group_extension(wait=True) is None, reason="needs a C++ compiler")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def run(
    way: Callable[..., tuple[Tensor, ...]], x: Tensor, group: Group, skip: int | None = None
) -> list[Tensor | None]:
    """Outputs and all gradients, none from the output `skip`."""
    outputs = way(x, group)
    used = [y for i, y in enumerate(outputs) if i != skip]
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in used]
    wanted = [x, *parameters(list(group.projections))] if x.requires_grad else parameters(list(group.projections))
    gradients = torch.autograd.grad(used, wanted, dys, allow_unused=True) if used and wanted else ()
    return [*[y.detach() for y in outputs], *gradients]


def by_python(x: Tensor, group: Group) -> tuple[Tensor, ...]:
    """Whose products, too, are Python's where the C++ is not there."""
    tensors = [tensor for projection in group.projections for tensor in projection.tensors()]
    result: tuple[Tensor, ...] = autograd.LoraGroup.apply(group, None, x, *tensors)
    return result


def same(x: Tensor, group: Group, skip: int | None = None) -> None:
    assert direct.serves(x, group)
    in_one, in_parts = run(direct.apply, x, group, skip), run(by_python, x, group, skip)
    with patch.object(direct, "group_extension", lambda: None):
        theirs = run(by_python, x, group, skip)
    for ours in (in_one, in_parts):
        assert len(ours) == len(theirs)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert (a is None) == (b is None), f"result {i}"
            if a is not None and b is not None:
                assert a.dtype == b.dtype and torch.equal(a, b), f"result {i}: {(a - b).abs().max()}"


def grouped(*projections: LoraProjection, dtypes: Dtypes | None = None) -> Group:
    return Group(projections, dtypes or Dtypes(F32, F32, F32), [None] * len(projections))


@pytest.mark.parametrize("dtypes", [*product((F32, BF16), repeat=3), (F64, F64, F64), (F16, F32, F16)], ids=str)
@pytest.mark.parametrize("x_dtype", [F32, BF16])
def test_the_same_bits(dtypes: tuple[torch.dtype, ...], x_dtype: torch.dtype) -> None:
    base = dtypes[0]
    group = grouped(
        projection(24, 16, 4, dtype=base, lora_dtype=F32, bias=True),
        projection(24, 9, dtype=base),
        projection(24, 40, 3, dtype=base, lora_dtype=F32, scaling=0.7),
        dtypes=Dtypes(*dtypes),
    )
    for shape in ((5, 24), (2, 3, 24)):
        same(torch.randn(shape).to(x_dtype).requires_grad_(), group)
        same(torch.randn(shape).to(x_dtype), group)
        for skip in range(3):
            same(torch.randn(shape).to(x_dtype).requires_grad_(), group, skip)


def test_weights_of_another_dtype_and_four_bits() -> None:
    whole = projection(64, 32, 4, dtype=BF16, lora_dtype=F32)
    packed = LoraProjection(FourBitWeight(encode_4bit(torch.randn(32, 64), nested=True)), None, whole.adapters)
    for weight in (whole, packed):
        same(torch.randn(4, 64, requires_grad=True), grouped(weight, projection(64, 8, 2)))


@pytest.mark.parametrize("trained", ["a", "b", ""])
def test_what_is_frozen_has_no_gradient(trained: str) -> None:
    group = grouped(projection(16, 8, 4), projection(16, 8, 2))
    for each in group.projections:
        each.adapters[0].a.requires_grad_(trained == "a")
        each.adapters[0].b.requires_grad_(trained == "b")
    same(torch.randn(3, 16, requires_grad=True), group)
    if trained:
        same(torch.randn(3, 16), group)


def test_strided_and_expanded() -> None:
    group = grouped(projection(16, 8, 4))
    same(torch.randn(16, 5).t().requires_grad_(), group)
    x = torch.randn(5, 16, requires_grad=True)
    (y,), (other,) = direct.apply(x, group), by_python(x, group)
    ours, theirs = torch.autograd.grad(y.sum(), x), torch.autograd.grad(other.sum(), x)
    assert torch.equal(*ours, *theirs)


def test_no_tokens() -> None:
    same(torch.randn(0, 16, requires_grad=True), grouped(projection(16, 8, 4)))


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


@pytest.mark.parametrize("way", [direct.apply, by_python])
def test_no_output_has_a_gradient(way: Any) -> None:
    x, group = torch.randn(5, 16, requires_grad=True), grouped(projection(16, 8, 4), projection(16, 9))
    outputs = [WithoutGradient.apply(y) for y in way(x, group)]
    sum(y.sum() for y in outputs).backward()  # type: ignore[no-untyped-call]
    assert all(t.grad is None for t in (x, *parameters(list(group.projections))))


def test_what_is_kept_is_in_the_same_order() -> None:
    """A recomputation may find the C++ that was not there yet in forward."""

    def kept(way: Any) -> list[torch.Size]:
        sizes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            way(torch.randn(5, 16, requires_grad=True), grouped(projection(16, 8, 4), projection(16, 9, 3)))
        return sizes

    assert kept(direct.apply) == kept(by_python)


def test_a_changed_weight_is_noticed() -> None:
    group = grouped(projection(16, 8, 4))
    (y,) = direct.apply(torch.randn(5, 16, requires_grad=True), group)
    group.projections[0].weight.decode().add_(1.0)
    with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
        y.sum().backward()


def test_a_changed_adapter_is_noticed() -> None:
    group = grouped(projection(16, 8, 4))
    (y,) = direct.apply(torch.randn(5, 16, requires_grad=True), group)
    with torch.no_grad():
        group.projections[0].adapters[0].a.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_twice() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    (y,) = direct.apply(x, grouped(projection(16, 8, 4)))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    (y,) = direct.apply(x, grouped(projection(16, 8, 4)))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    group, x = grouped(projection(16, 8, 4)), torch.randn(5, 16, requires_grad=True)
    y = checkpoint(lambda x: direct.apply(x, group)[0], x, use_reentrant=reentrant)
    expected = run(direct.apply, x, group)
    torch.manual_seed(0)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(dy)
    assert torch.equal(x.grad, expected[1])


@pytest.mark.parametrize(("parameters", "wanted"), list(product((F32, BF16, F16), repeat=2)), ids=str)
def test_packed_adapters(parameters: torch.dtype, wanted: torch.dtype) -> None:
    """The bits of `parts.pack`: rounded to the parameters' dtype, then to the products'."""
    projections = [projection(16, 8, 4, scaling=0.37), projection(16, 12), projection(16, 5, 3, scaling=2.0)]
    cast = [
        replace(p, adapters=tuple([replace(a, a=a.a.to(parameters), b=a.b.to(parameters)) for a in p.adapters]))
        for p in projections
    ]
    for some in (cast, cast[:1], [replace(cast[0], adapters=(replace(cast[0].adapters[0], scaling=1.0),))]):
        group = Group(some, Dtypes(wanted, wanted, wanted), [None] * len(some))
        ours, theirs = direct.pack(group), parts.pack(some, wanted)
        assert ours is not None and ours.a is not None and theirs.a is not None
        assert ours.a.dtype == wanted and torch.equal(ours.a, theirs.a)
        for b, other in zip(ours.b, theirs.b, strict=True):
            assert (b is None) == (other is None)
            assert b is None or other is None or (b.dtype == wanted and torch.equal(b, other))


def test_packed_where_there_is_more() -> None:
    assert direct.pack(grouped(projection(16, 8, 4, 4))) is None
    assert direct.pack(grouped(projection(16, 8, 4, with_bias=True))) is None
    nothing = direct.pack(grouped(projection(16, 8)))
    assert nothing is not None and (nothing.a, nothing.b) == (None, [None])
    scaled = projection(16, 8, 4)
    scaling = torch.tensor(2.0)
    assert direct.pack(grouped(replace(scaled, adapters=(replace(scaled.adapters[0], scaling=scaling),)))) is None
    empty = replace(scaled.adapters[0], a=torch.empty(0, 16), b=torch.empty(8, 0))
    assert direct.pack(grouped(scaled, replace(scaled, adapters=(empty,)))) is None


@pytest.mark.parametrize("dtypes", [Dtypes(F32, F32, F32), Dtypes(BF16, BF16, BF16), Dtypes(BF16, F32, BF16)])
@pytest.mark.parametrize("needs_x", [True, False])
def test_gradient_of_x_by_python(dtypes: Dtypes, needs_x: bool) -> None:
    """The same bits where only that product is not C++'s; also without one output's gradient, and again."""
    x = torch.randn(2, 5, 16, dtype=dtypes.out, requires_grad=needs_x)
    group = Group([projection(16, 8, 4), projection(16, 12, 4), projection(16, 4)], dtypes, [None] * 3)
    adapters = [t for p in group.projections for t in p.tensors() if t is not None and t.requires_grad]
    wanted = [x, *adapters] if needs_x else adapters

    def derived(served: str) -> list[torch.Tensor | None]:
        y, z, _ = direct.apply(x, group, served)
        both = torch.autograd.grad([y, z], wanted, [torch.ones_like(y), z.detach()], retain_graph=True)
        return [y, z, *both, *torch.autograd.grad(z, wanted, z.detach(), allow_unused=True)]

    for ours, theirs in zip(derived(direct.BUT_DX), derived(direct.ALL), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or theirs is None or torch.equal(ours, theirs)


def test_compiled_autograd_gets_python() -> None:
    import torch._dynamo.compiled_autograd as compiled

    x, group = torch.randn(5, 16, requires_grad=True), grouped(projection(16, 8, 4))
    (expected,) = torch.autograd.grad(autograd.apply(x, group)[0].sum(), x)
    with compiled._enable(lambda graph: graph):
        assert not direct.serves(x, group)
        autograd.apply(x, group)[0].sum().backward()
    assert direct.serves(x, group) and torch.equal(x.grad, expected)


def test_what_it_leaves_to_python() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    plain = projection(16, 8, 4)
    assert direct.serves(x, grouped(plain))
    assert not direct.serves(torch.randn(2048, 16), grouped(plain)), "our own C++ products are faster there"
    assert not direct.serves(x, grouped(projection(16, 8, 4, 4)))
    assert not direct.serves(x, grouped(projection(16, 8, 4, magnitude=True)))
    assert not direct.serves(x, grouped(projection(16, 8, 4, with_bias=True)))
    assert not direct.serves(x, grouped(projection(16, 8, 0)))
    assert not direct.serves(x, Group([plain], Dtypes(F32, F32, F32), [torch.tensor([1])]))
    with choosing.meeting():
        assert not direct.serves(x, grouped(plain))


@pytest.mark.parametrize(
    ("index", "backend", "served"),
    [(None, "auto", direct.BUT_DX), ((0, 1), "auto", direct.ALL), ((0, 1), "triton", direct.BUT_DX)],
)
def test_mixed_batches_leave_large_products_to_the_library(
    index: tuple[int, ...] | None, backend: str, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU whose sums of several dX our kernels would make."""
    monkeypatch.setattr(direct, "kernels_serve", lambda device: True)
    monkeypatch.setattr(direct, "chosen", lambda *_: "library")
    monkeypatch.setattr(direct.MixedProducts, "ours", lambda *_: False)
    monkeypatch.setattr(direct, "measured", lambda *_, **__: "torch")
    monkeypatch.setattr(direct, "sums_products", lambda *given: given[-1] != "library")
    group = Group([projection(8, 8, 2), projection(8, 8, 2)], Dtypes(BF16, BF16, BF16), [None] * 2, backend, index)
    assert group.large_backend == ("library" if served == direct.ALL else backend)
    assert direct._decide(4, torch.device("cuda"), group) == served
