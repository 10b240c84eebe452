"""The steps' Triton kernels in Triton's interpreter, held to fp64 beside the PyTorch steps."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.loss import steps
from fastpeft_kernels.loss.steps import Running
from tests.budget import assert_within_budget

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities
]

TOKENS, WORDS = 3, 27
CHUNKS = ((0, 24), (24, 27))  # two blocks, the last in part; narrower than a lane
F32, F16, F64 = torch.float32, torch.float16, torch.float64  # the interpreter computes bfloat16 wrongly
EXTRAS = {"tilted": True, "best": True, "total": True}


@pytest.fixture
def module() -> ModuleType:
    return pytest.importorskip("fastpeft_kernels.loss.triton_steps")


@pytest.fixture
def small() -> dict[str, Any]:
    """Blocks that the interpreter can afford, so that a chunk has several."""
    tiles = pytest.importorskip("fastpeft_kernels.loss.tiles")
    return {"config": tiles.Config(16, 1)}


def draw(dtype: torch.dtype, mapped: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Products with memory of others beside them, labels (one of no word), and the map onto logits, all or nothing."""
    raw = (torch.randn(TOKENS, WORDS + 9) * 3).to(dtype)[:, :WORDS]
    labels = torch.randint(0, WORDS, (TOKENS,))
    labels[1] = -100
    bias, class_weight = torch.randn(WORDS).to(dtype), torch.rand(WORDS)
    given = {"bias": bias, "scale": 0.7, "softcap": 5.0, "class_weight": class_weight}
    return raw, labels, given if mapped else {}


def of_words(given: dict[str, Any], first: int, last: int, dtype: torch.dtype) -> dict[str, Any]:
    """The map onto the logits of some words, in fp64 for the oracle."""
    own = {name: x[first:last] if isinstance(x, Tensor) else x for name, x in given.items()}
    return {name: x.double() if dtype == F64 and isinstance(x, Tensor) else x for name, x in own.items()}


def walk(
    module: ModuleType,
    raw: Tensor,
    labels: Tensor,
    given: dict[str, Any],
    write: bool,
    extras: dict[str, bool],
    **others: Any,
) -> tuple[Running, Tensor, Tensor]:
    """The statistics; the factors of all steps; what they have written."""
    running = Running.start(len(raw), torch.promote_types(raw.dtype, F32), raw.device, **extras)
    factors, left = [], torch.full_like(raw, torch.nan)
    for first, last in CHUNKS:
        chunk = left[:, first:last].copy_(raw[:, first:last])
        own = of_words(given, first, last, raw.dtype)
        module.online_step(chunk, first, labels, running, **own, write=write, **others)
        factors.append(running.factor.clone())
    return running, torch.stack(factors), left


def gathered(running: Running, labels: Tensor, each: bool) -> dict[str, Tensor]:
    """Each statistic; or, of 16-bit products, what is made of them: the few tokens' own are fp32 numbers."""
    if each:
        return {field.name: getattr(running, field.name) for field in fields(Running) if field.name != "best"}
    known, entropy = steps.known(running), steps.entropy(running)
    assert running.total is not None
    return {"nll": known.nll[labels != -100], "lse": known.lse, "entropy": entropy, "total": running.total}


def check_statistics(module: ModuleType, small: Any, dtype: torch.dtype, mapped: bool, write: bool) -> None:
    raw, labels, given = draw(dtype, mapped)
    arguments = (labels, given, write, EXTRAS)
    ours, *our_results = walk(module, raw, *arguments, **small)
    same, *same_results = walk(steps, raw, *arguments)
    exact, *exact_results = walk(steps, raw.double(), *arguments)
    assert torch.equal(ours.best, exact.best)
    results = [gathered(running, labels, dtype == F32) for running in (ours, same, exact)]
    for name in results[0]:
        assert_within_budget(*(result[name] for result in results), name)
    if not write:
        assert torch.equal(our_results[1], raw)
    torch.testing.assert_close(our_results[0].double(), exact_results[0], rtol=2e-6, atol=1e-30)
    if write:
        assert_within_budget(our_results[1], same_results[1], exact_results[1], "what is left")


@pytest.mark.parametrize(
    ("dtype", "mapped", "write"), ((F32, True, True), (F32, False, False), (F16, True, False), (F16, False, True))
)
def test_statistics(module: ModuleType, small: Any, dtype: torch.dtype, mapped: bool, write: bool) -> None:
    check_statistics(module, small, dtype, mapped, write)


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "mapped", "write"), ((F32, True, False), (F32, False, True), (F16, True, True), (F16, False, False))
)
def test_other_statistics(module: ModuleType, small: Any, dtype: torch.dtype, mapped: bool, write: bool) -> None:
    check_statistics(module, small, dtype, mapped, write)


def gradients(
    module: ModuleType,
    raw: Tensor,
    labels: Tensor,
    given: dict[str, Any],
    rows: list[Tensor | None],
    **others: Any,
) -> Tensor:
    left = raw.clone()
    for first, last in CHUNKS:
        own = of_words(given, first, last, raw.dtype)
        module.gradient_step(left[:, first:last], first, labels, *rows, **own, **others)
    return left


@pytest.mark.parametrize("dtype", (F32, F16))
@pytest.mark.parametrize("wanted", ((1, 1, 1), (1, 0, 0), (0, 1, 1)), ids=str)
def test_gradient(module: ModuleType, small: Any, dtype: torch.dtype, wanted: tuple[int, ...]) -> None:
    raw, labels, given = draw(dtype, wanted != (1, 0, 0))
    known = steps.known(walk(steps, raw.double(), labels, given, False, {})[0])
    rows = [known.top, known.inverse, known.others, *(torch.randn(TOKENS, dtype=F64) if w else None for w in wanted)]
    for row in rows[3:]:
        if row is not None:
            row[2] = 0.0
    narrow = [None if row is None else row.float() for row in rows]
    ours = gradients(module, raw, labels, given, narrow, **small)
    assert not ours[2].any()
    same = gradients(steps, raw, labels, given, narrow)
    exact = gradients(steps, raw.double(), labels, given, rows)
    assert_within_budget(ours, same, exact, "gradient")
    first, last = CHUNKS[0]
    apart = torch.full_like(raw, torch.nan)
    own = of_words(given, first, last, dtype)
    module.gradient_step(raw[:, first:last], first, labels, *narrow, **own, out=apart[:, first:last], **small)
    assert torch.equal(apart[:, first:last], ours[:, first:last]) and apart[:, last:].isnan().all()


@pytest.mark.parametrize("write", (True, False), ids=("written", "unwritten"))
def test_extremes(module: ModuleType, small: Any, write: bool) -> None:
    """Masked words, a whole row of them, huge logits, a confident label; NaN and inf spoil their own rows alone."""
    raw = torch.randn(7, WORDS) * 3
    raw[0, ::2] = -torch.inf
    raw[1] = -torch.inf
    raw[2] *= 1e4
    raw[3, 20] = 60.0
    raw[4, 7] = torch.nan
    raw[5, 26] = torch.inf
    raw[6] += torch.arange(WORDS) * 9.0  # the reference point moves with every block
    labels = torch.tensor([1, 4, 5, 20, 9, 3, 25])
    ours, _, left = walk(module, raw, labels, {}, write, EXTRAS, **small)
    same, _, theirs = walk(steps, raw, labels, {}, write, EXTRAS)
    sound = [0, 2, 3, 6]
    for name in ("nll", "lse", "others"):
        x, y = (getattr(steps.known(running), name) for running in (ours, same))
        torch.testing.assert_close(x[sound], y[sound], rtol=1e-5, atol=0.0)
        assert not x[4].isfinite() and not x[5].isfinite()
    assert 0 < steps.known(ours).nll[3] < 1e-20
    torch.testing.assert_close(steps.entropy(ours)[sound], steps.entropy(same)[sound], rtol=1e-5, atol=1e-6)
    if write:
        torch.testing.assert_close(left[[1, *sound]], theirs[[1, *sound]], rtol=1e-5, atol=1e-37)


def test_left_out_tokens(module: ModuleType, small: Any) -> None:
    raw, labels, _ = draw(F32, False)
    raw[1] = torch.nan
    ours = walk(module, raw, labels, {}, False, {}, **small, ignore_index=-100)[0]
    every = walk(steps, raw, labels, {}, False, {})[0]
    start = Running.start(TOKENS, F32, raw.device)
    rest = labels != -100
    for name in ("top", "others", "label"):
        value = getattr(ours, name)
        assert value[1] == getattr(start, name)[1]
        torch.testing.assert_close(value[rest], getattr(every, name)[rest], rtol=1e-6, atol=0.0)


def test_rescale(module: ModuleType) -> None:
    acc, factor = torch.randn(4, 1100)[:, :1031], torch.tensor([1.0, 0.5, 0.0, 3.0])
    wanted, beside = acc * factor[:, None], acc._base[:, 1031:].clone()
    module.rescale(acc, factor)
    assert torch.equal(acc, wanted) and torch.equal(acc._base[:, 1031:], beside)


@pytest.mark.full
@pytest.mark.parametrize("dtype", (F32, F16))
def test_every_configuration(module: ModuleType, dtype: torch.dtype) -> None:
    from fastpeft_kernels.loss.tiles import CONFIGS

    raw, labels, given = draw(dtype, True)
    ours = [walk(module, raw, labels, given, True, {}, config=config) for config in CONFIGS]
    for running, _, left in ours[1:]:
        torch.testing.assert_close(running.others, ours[0][0].others, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(left, ours[0][2], rtol=1e-3, atol=0.0)


def test_refuses_bfloat16(module: ModuleType, small: Any) -> None:
    raw, labels, _ = draw(torch.bfloat16, False)
    with pytest.raises(ValueError, match=r"backend: expected fp32 or fp16 in Triton's interpreter"):
        walk(module, raw, labels, {}, True, {}, **small)
