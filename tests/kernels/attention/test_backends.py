"""Who serves, and that all of them give the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastpeft_kernels import tuner
from fastpeft_kernels.attention import Mask, api, attention, choosing
from fastpeft_kernels.attention.reference import attention_reference
from fastpeft_kernels.attention.scores import Scores
from fastpeft_kernels.tuning.choosing import forced, meeting

from .drawn import Case, assert_same, gradients, make_case

REAL = torch.arange(40)[None] < torch.tensor([[40], [31]])


def chosen(case: Case, **more: Any) -> str:
    """The backend that "auto" stands for, as autograd's node or the called function tells."""
    called: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Watch():
        out = attention(case.q, case.k, case.v, **case.arguments() | more)
    if "scaled_dot_product_attention" in called:
        return "sdpa"
    node = (out[0] if isinstance(out, tuple) else out).grad_fn.name()
    return "own" if node == "AttentionBackward" else "reference"


LARGE = {"queries": 200, "keys": 200}


@pytest.mark.parametrize("mask", [Mask(left=30, right=0), Mask(right=0, keys=REAL), Mask(start=None), Mask()], ids=str)
def test_a_gpu_without_our_kernels(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be chosen there, computed here."""
    case = make_case(queries=40, keys=40, mask=mask, extras=[])
    scores = Scores(0.3)
    arguments = (case.q, case.k, case.v, mask, scores, False, False)
    assert choosing._on_a_gpu(*arguments, count=1 << 20) == "dense"
    assert choosing._on_a_gpu(*arguments, count=1 << 40) == "auto"
    capped = (case.q, case.k, case.v, mask, Scores(0.3, softcap=2.0), False, False)
    assert choosing._on_a_gpu(*capped, count=1 << 20) == "reference"
    assert choosing._on_a_gpu(*capped, count=1 << 30) == "auto"
    with monkeypatch.context() as kernels:
        kernels.setattr(choosing, "own_backend", lambda *_: "triton")
        assert choosing._on_a_gpu(*arguments, count=1 << 20) == "dense", "launches would take longer"
        assert choosing._on_a_gpu(*arguments, count=1 << 24) == "auto"
        assert choosing._on_a_gpu(*capped, count=1 << 20) == "auto"
    monkeypatch.setattr(api, "backend_of", lambda *_: "dense")
    found = attention(case.q, case.k, case.v, mask=mask, scale=0.3)
    wanted = attention(case.q, case.k, case.v, mask=mask, scale=0.3, backend="reference")
    assert isinstance(found, Tensor) and isinstance(wanted, Tensor)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_plain(causal: bool) -> None:
    case = make_case(**LARGE, mask=Mask(), extras=[])
    found = api.plain_attention(case.q, case.k, case.v, causal=causal, scale=0.2)
    wanted = attention(case.q, case.k, case.v, mask=Mask(right=0) if causal else None, scale=0.2)
    assert found is not None and isinstance(wanted, Tensor)
    assert found.is_contiguous() and torch.equal(found, wanted.transpose(1, 2))
    odd = case.v[..., :5]  # of heads that PyTorch's own does not fuse
    assert api.plain_attention(case.q, case.k, odd, causal=causal) is None
    assert api.plain_attention(case.q, case.k, case.v, dropout=0.1) is None, "a CPU's has no dropout"


@pytest.mark.parametrize(
    ("sizes", "mask", "extras", "want"),
    [
        (LARGE, Mask(), [], "sdpa"),
        (LARGE, Mask(right=0), [], "sdpa"),
        (LARGE, Mask(right=0, left=199), [], "sdpa"),
        (LARGE, Mask(right=0, left=198), [], "sdpa"),
        ({"queries": 600, "keys": 600}, Mask(right=0, left=198), [], "own"),
        (LARGE, Mask(right=0), ["softcap"], "own"),
        ({"queries": 200, "keys": 300}, Mask(right=0), [], "sdpa"),
        ({"queries": 200, "keys": 40}, Mask(keys=REAL), [], "sdpa"),
        ({"queries": 1, "keys": 40}, Mask(left=7, right=0, keys=REAL), [], "sdpa"),
        ({"queries": 1, "keys": 40}, Mask(left=-3), [], "reference"),  # the last three keys are not seen
        ({}, Mask(), ["sinks"], "reference"),
        ({"queries": 0}, Mask(), [], "reference"),
        ({"batch": 0}, Mask(), [], "reference"),
        ({"keys": 0}, Mask(right=0), [], "reference"),
    ],
)
def test_default(sizes: dict[str, int], mask: Mask, extras: list[str], want: str) -> None:
    case = make_case(**sizes, mask=mask, extras=extras)
    assert chosen(case) == want
    assert_same(case.to(torch.float64), lambda case: (attention(case.q, case.k, case.v, **case.arguments()), None))


def test_lse_and_16_bits_take_what_is_fast_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(make_case(**LARGE), return_lse=True) == "own"
    monkeypatch.setattr(choosing, "product_dtype", lambda dtype, device: torch.float32)
    case = make_case(**LARGE, dtype=torch.bfloat16)
    assert chosen(case) == "own"
    with torch.no_grad():
        assert choosing.backend_of(case.q, case.k, case.v, Mask(), case.scores, False, False) == "sdpa"
    monkeypatch.setattr(choosing, "product_dtype", lambda dtype, device: dtype)
    assert chosen(case) == "sdpa"


@pytest.mark.parametrize("backend", ("auto", "sdpa", "blockwise", "reference"))
@pytest.mark.parametrize(
    "mask",
    (
        Mask(),
        Mask(right=0),
        Mask(keys=torch.tensor([[True] * 24, [False] * 24])),
        Mask(dense=torch.arange(24) % 7 == torch.arange(24)[:, None] % 9),
    ),
    ids=("all", "causal", "nothing seen", "dense"),
)
def test_backends_agree(backend: str, mask: Mask) -> None:
    case = make_case(queries=24, keys=24, mask=mask, dtype=torch.float64)
    assert_same(case, lambda case: (attention(case.q, case.k, case.v, **case.arguments(), backend=backend), None))
    out = attention(case.q, case.k, case.v, **case.arguments(), backend=backend)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("v_features", (16, 5), ids=("fused", "not fused"))
@pytest.mark.parametrize("queries", (1, 2))
@pytest.mark.parametrize("backend", ("sdpa", "blockwise"))
def test_few_queries_that_see_nothing(backend: str, queries: int, v_features: int) -> None:
    mask = Mask(keys=torch.tensor([[True] * 24, [False] * 24]))
    case = make_case(queries=queries, keys=24, v_features=v_features, mask=mask, dtype=torch.float64)
    assert_same(case, lambda case: (attention(case.q, case.k, case.v, **case.arguments(), backend=backend), None))
    out = attention(case.q, case.k, case.v, **case.arguments(), backend=backend)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ("sdpa", "blockwise", "reference"))
def test_decoding_with_a_window(backend: str) -> None:
    case = make_case(queries=1, keys=40, mask=Mask(left=7, right=0, keys=REAL), dtype=torch.float64)
    assert_same(case, lambda case: (attention(case.q, case.k, case.v, **case.arguments(), backend=backend), None))


@pytest.mark.parametrize("backend", ("sdpa", "blockwise", "reference"))
def test_autocast(backend: str) -> None:
    case = make_case(queries=24, keys=24)
    bf16 = case.to(torch.bfloat16)
    want = attention(bf16.q, bf16.k, bf16.v, backend=backend)
    dout = torch.randn(want.shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(case.q, case.k, case.v, backend=backend)
        assert torch.equal(out, want)
        found = gradients(out, dout, case.inputs())
    for name, grad in gradients(want, dout, bf16.inputs()).items():
        torch.testing.assert_close(found[name], grad.float(), rtol=0, atol=0)


@pytest.mark.parametrize("extras", ([], ["relative"], ["relative", "bias"]), ids=str)
@pytest.mark.parametrize("mask", (Mask(), Mask(left=30, right=0, keys=REAL)), ids=("all", "window and padding"))
def test_few_dropped_scores_are_kept_on_a_cpu(extras: list[str], mask: Mask) -> None:
    """With values that show the weights, what was dropped is known, and the rest is the definition's."""
    p, case = 0.3, make_case(queries=40, keys=40, v_features=40, mask=mask, extras=extras, dtype=torch.float64)
    case.v = torch.eye(40, dtype=torch.float64).expand(2, 2, 40, 40).clone().requires_grad_()
    assert chosen(case, dropout=p) == "sdpa"
    out = attention(case.q, case.k, case.v, **case.arguments() | {"dropout": p})
    whole, _ = attention_reference(case.q, case.k, case.v, case.mask, case.scores)
    kept = out != 0
    assert 0.6 < kept[whole != 0].double().mean() < 0.8
    want = torch.where(kept, whole / (1 - p), 0.0)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-11)
    dout, inputs = torch.randn_like(out), case.inputs()
    del inputs["v"]  # to the definition, dropping comes after it
    expected = gradients(want, dout, inputs)
    for name, grad in gradients(out, dout, inputs).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-11)


def test_which_dropped_scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that no attention of PyTorch's gives, and not many."""

    def backend(case: Case, seed: Tensor | None = None, with_lse: bool = False) -> str:
        scores = replace(case.scores, dropout=0.1, seed=seed)
        return choosing.backend_of(case.q, case.k, case.v, Mask(right=0), scores, with_lse, False)

    case = make_case(**LARGE)
    assert backend(case) == "dense"
    assert backend(case, with_lse=True) == backend(case, torch.tensor([3])) == "auto"
    for extra in ("softcap", "sinks"):
        assert backend(make_case(**LARGE, extras=[extra])) == "auto"
    monkeypatch.setattr(choosing, "_FEW_DROPPED", 2 * 4 * 200 * 200 - 1)
    assert backend(case) == "auto"


def test_nothing_to_see_and_nobody_to_see_it() -> None:
    case = make_case(keys=0, extras=["sinks"])
    out, lse = attention(case.q, case.k, case.v, **case.arguments(), return_lse=True)
    assert out.shape == (2, 4, 19, 16) and not out.any()
    assert torch.equal(lse[0, :, 0], case.scores.sinks)
    out, lse = attention(case.q, case.k, case.v, return_lse=True)
    assert (lse == -torch.inf).all() and not torch.autograd.grad(out.sum(), case.q)[0].any()


def test_the_seed_is_drawn_where_it_is_needed() -> None:
    case = make_case()

    def once(**more: Any) -> Tensor:
        return attention(case.q, case.k, case.v, dropout=0.4, **more)

    torch.manual_seed(3)
    first, second = once(), once()
    torch.manual_seed(3)
    assert torch.equal(once(), first) and not torch.equal(first, second)
    seed = torch.tensor([5])
    before = torch.get_rng_state()
    assert torch.equal(once(seed=seed), once(seed=seed))
    attention(case.q, case.k, case.v)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(once(seed=seed, backend="reference"), once(seed=seed, backend="blockwise"))


@pytest.mark.parametrize("reentrant", (True, False))
def test_checkpointing_drops_the_same(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    case = make_case(**LARGE, mask=Mask(right=0))

    def block(q: Tensor) -> Tensor:
        return attention(q, case.k, case.v, mask=case.mask, dropout=0.4)

    torch.manual_seed(7)
    want = block(case.q)
    torch.manual_seed(7)
    out = checkpoint(block, case.q, use_reentrant=reentrant)
    assert torch.equal(out, want)
    found, expected = _backward(out, case), _backward(want, case)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _backward(out: Tensor, case: Case) -> list[Tensor]:
    case.q.grad = case.k.grad = None
    out.square().sum().backward()
    return [case.q.grad, case.k.grad]


def test_the_choice_is_measured() -> None:
    case = make_case(queries=64, keys=64, mask=Mask(right=0))
    with meeting() as met:
        attention(case.q, case.k, case.v, mask=case.mask)
    (tunable, key), *others = tuner.cases_for(met, torch.device("cpu"), [128])
    assert not others and tunable.op == "attention" and key.queries == 64 and key.batch == 2
    assert str(key) == "2x4(2)x64x64x16, causal, float32, with gradients"
    outcome = tuner.measure(tunable, key, torch.device("cpu"), seconds=0.05)
    assert not outcome.dropped and set(outcome.winner.us) == {"sdpa", "blockwise"}
    with forced({"attention": "blockwise"}):
        assert chosen(case) == "own"
