"""The steps of a fused loss in C++, on a CPU."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import call, native_steps, steps
from fastpeft_kernels.loss.choosing import steps_of
from fastpeft_kernels.loss.problem import Needs, Problem
from fastpeft_kernels.loss.steps import Running
from fastpeft_kernels.native import build, native_library
from fastpeft_kernels.native import loss as native_loss
from tests.budget import assert_within_budget

from .heads import make_case

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
TOKENS = 40


@pytest.fixture(autouse=True)
def _built() -> None:
    if native_library() is None:
        pytest.skip("no C++ compiler here")


def both(module: Any, raw: Tensor, wide: torch.dtype, words: int, more: dict[str, Any]) -> dict[str, Tensor]:
    """After chunks of so many words: what `online_step` wrote and knows, and what `gradient_step` makes of it."""
    found: dict[str, Tensor] = {}
    labels = torch.arange(TOKENS) * 37 % raw.shape[1]
    running = Running.start(TOKENS, wide, CPU, total=True)

    def chunks() -> list[tuple[int, Tensor, dict[str, Any]]]:
        every = range(0, raw.shape[1], words)
        parts = [{k: v[i : i + words] if isinstance(v, Tensor) else v for k, v in more.items()} for i in every]
        return [(i, raw[:, i : i + words].clone(), part) for i, part in zip(every, parts, strict=True)]

    for first, z, part in chunks():
        module.online_step(z, first, labels, running, **part, write=True)
        found[f"written {first}"] = z
    known = steps.known(running)
    found |= {"nll": known.nll, "lse": known.lse, "inverse": known.inverse, "others": known.others}
    found |= {"total": running.total, "top": running.top, "factor": running.factor}
    d_nll, d_lse, d_total = torch.linspace(-1, 2, 3 * TOKENS).view(3, TOKENS)
    for name, given in {"all": (d_nll, d_lse, d_total), "nll": (d_nll, None, None)}.items():
        factors = [None if d is None else d.to(wide) for d in given]
        for first, z, part in chunks():
            module.gradient_step(z, first, labels, known.top, known.inverse, known.others, *factors, **part)
            found[f"gradient of {name} {first}"] = z
    return found


@pytest.mark.parametrize("classes", (False, True))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_within_the_budget(dtype: torch.dtype, softcap: float | None, bias: bool, classes: bool) -> None:
    """Three chunks, rows of several buffers and a rest; a row stride."""
    words = 1500
    raw = (torch.randn(TOKENS, words + 5) * torch.linspace(0.1, 5, words + 5)).to(dtype)[:, :words]
    more: dict[str, Any] = {"scale": 1.5, "softcap": softcap}
    more |= {"bias": torch.randn(words).to(dtype)} if bias else {}
    more |= {"class_weight": torch.rand(words)} if classes else {}
    ours = both(native_steps, raw, F32, 700, more)
    plain, exact = both(steps, raw, F32, 700, more), both(steps, raw.double(), F64, 700, more)
    for name, value in ours.items():
        if name != "total":  # of it the sum below
            assert_within_budget(value, plain[name], exact[name], name)
    error = (ours["total"] - exact["total"]).norm()
    assert error <= 2 * (plain["total"] - exact["total"]).norm() + torch.finfo(F32).eps * exact["total"].norm()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")
@pytest.mark.parametrize("instructions", ("x86-64", "x86-64-v3"))
def test_sums_of_many_equal_numbers_in_narrow_vectors(instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four or eight fp32 lanes would round hundreds of sums the same way."""
    flags = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    built = build.built("narrow", ["loss.cpp"], build.HEADERS, [*flags, f"-march={instructions}"], "a test's")
    library = ctypes.CDLL(str(built))
    monkeypatch.setattr(native_loss, "native_library", lambda: library)
    gaps = torch.linspace(0.05, 3, TOKENS).unsqueeze(1)
    raw = (1 - gaps).repeat(1, 8000)
    raw[:, 100] = 1.0
    more: dict[str, Any] = {"class_weight": torch.full((8000,), 0.3)}
    ours = both(native_steps, raw, F32, 8000, more)
    plain, exact = both(steps, raw, F32, 8000, more), both(steps, raw.double(), F64, 8000, more)
    for name in ("nll", "lse", "inverse", "others", "total"):
        assert_within_budget(ours[name], plain[name], exact[name], name)


@pytest.mark.parametrize("softcap", (None, 3.0))
def test_infinities_and_nan(softcap: float | None) -> None:
    raw = torch.randn(TOKENS, 600)
    raw[0], raw[1, 550], raw[2, 3], raw[3, 9], raw[4] = -torch.inf, -torch.inf, torch.nan, torch.inf, 3e38
    raw[5, :] = torch.linspace(-300, 300, 600)
    ours, plain = (both(module, raw, F32, 600, {"softcap": softcap}) for module in (native_steps, steps))
    for name in ("nll", "lse", "inverse", "others", "gradient of all 0", "gradient of nll 0"):
        torch.testing.assert_close(ours[name], plain[name], equal_nan=True, rtol=2e-6, atol=1e-6, msg=name)
    assert ours["nll"][2].isnan() and not ours["nll"][4:].isnan().any()
    assert ours["nll"][3].isnan() == (softcap is None)


def test_what_is_wanted_seldom_is_pytorchs() -> None:
    raw, labels = torch.randn(TOKENS, 50), torch.arange(TOKENS)
    found = [Running.start(TOKENS, F32, CPU, tilted=True, best=True) for _ in range(2)]
    for module, running in zip((native_steps, steps), found, strict=True):
        module.online_step(raw.clone(), 0, labels, running)
    assert found[0].best is not None and found[0].best.equal(raw.argmax(-1))
    assert steps.entropy(found[0]).equal(steps.entropy(found[1]))


def test_who_serves() -> None:
    assert steps_of(F32, CPU) is steps_of(BF16, CPU) is native_steps
    assert steps_of(F64, CPU) is steps_of(F32, torch.device("meta")) is steps


@pytest.mark.parametrize("ignored", (0.0, 0.3))
@pytest.mark.parametrize("dtype", (F64, BF16))
def test_one_walk_and_two(dtype: torch.dtype, ignored: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of label smoothing's gradients: several blocks and chunks, an update, in place or apart."""
    monkeypatch.setattr("fastpeft_kernels.loss.blocks._ON_CPU", (16, 600))
    case = make_case(50, words=2500, dtype=dtype, frozen=False, rank=2, bias=True, label_smoothing=0.3, ignored=ignored)
    made, asked, one_walk = [], [], call.one_walk

    def together(problem: Problem, needs: Needs) -> bool:
        asked.append(one_walk(problem, needs))
        return len(asked) == 1 and asked[0]

    monkeypatch.setattr(call, "one_walk", together)
    for _ in range(2):
        loss = case.call().loss
        made.append(torch.autograd.grad(loss, [x for x in case.tensors.values() if x.requires_grad]))
    assert asked == [True, True]
    rounding = 4 * torch.finfo(dtype).eps
    for mine, other in zip(*made, strict=True):
        assert (mine - other).norm() <= rounding * other.norm()


def test_no_room_is_an_error_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """In C++ it would end the process."""
    given = (
        torch.zeros(2, 8, dtype=BF16),
        0,
        torch.zeros(2, dtype=torch.int64),
        Running.start(2, F32, CPU, total=False),
    )

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Tensor, "new_empty", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        native_steps.online_step(*given, write=True)


def test_each_thread_has_room() -> None:
    raw, found = torch.randn(64, 2048).to(BF16), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(both(native_steps, raw.clone()[:TOKENS], F32, 2048, {}))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
