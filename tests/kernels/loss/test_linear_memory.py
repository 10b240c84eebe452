"""No logits: what the fused loss allocates, and how many products it makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpeft.memory.trace.live import LiveBytes
from fastpeft_kernels.common.shapes import imitating
from fastpeft_kernels.loss import Head, blocks, forward, linear_cross_entropy, recompute
from fastpeft_kernels.loss.blocks import Blocks, Sizes, choose_blocks
from fastpeft_kernels.weights import DenseWeight

from .heads import Case, make_case

TOKENS, FEATURES, WORDS = 600, 48, 9000  # two blocks of tokens, nine chunks of words
LOGITS = 4 * TOKENS * WORDS


class Watched(TorchDispatchMode):
    """The largest tensor that any operation gives, and the multiplications of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            if 4 not in (*a.shape, *b.shape):  # of a low rank
                self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return results


def watch(case: Case) -> Watched:
    with Watched() as found:
        case.call(log_probs=True, entropy=True, correct=True).loss.backward()
    return found


def case_of(**more: Any) -> Case:
    return make_case(TOKENS, features=FEATURES, words=WORDS, ignored=0.0, **more)


@pytest.mark.parametrize("head", ({}, {"rank": 4, "z_loss": 0.1}, {"storage": "four_bit"}, {"label_smoothing": 0.1}))
def test_nothing_of_tokens_by_words(head: dict[str, Any]) -> None:
    """No block of one chunk is larger, nor any copy of the weight, nor the hidden states."""
    assert watch(case_of(**head)).largest <= max(4 * 512 * 1024, 4 * WORDS * FEATURES)


def test_nothing_of_tokens_by_words_with_a_trained_head() -> None:
    assert watch(case_of(frozen=False, rank=4, bias=True)).largest <= max(4 * 512 * 1024, 4 * WORDS * FEATURES)


@pytest.mark.parametrize(
    "products, head",
    (
        (2, {}),
        (2, {"storage": "four_bit", "z_loss": 0.1, "class_weight": True}),
        (3, {"label_smoothing": 0.1, "rank": 4, "class_weight": True}),
        (3, {"label_smoothing": 0.1, "softcap": 20.0}),
        (1, {"hidden_trained": False}),
        (4 - FEATURES / TOKENS, {"frozen": False}),  # the logits of as many tokens as there are features are kept
        (4 - FEATURES / TOKENS, {"frozen": False, "bias": True, "rank": 4, "z_loss": 0.1}),
        (4 - FEATURES / TOKENS, {"frozen": False, "label_smoothing": 0.1, "softcap": 20.0}),
        (3 - FEATURES / TOKENS, {"frozen": False, "hidden_trained": False}),
        (3, {"storage": "four_bit", "rank": 4, "frozen": False}),  # the update's own products are not counted
        (4, {"frozen": False, "reduction": "none"}),
    ),
)
def test_how_many_products(products: float, head: dict[str, Any]) -> None:
    """Each of tokens x words x features, forward and backward."""
    case = case_of(**head)
    with Watched() as found:
        loss = case.call().loss
        if loss.requires_grad:
            loss.sum().backward()
    assert found.multiplications == round(products * TOKENS * WORDS * FEATURES)


def test_without_gradients_one_product() -> None:
    with torch.no_grad(), Watched() as found:
        case_of(frozen=False).call()
    assert found.multiplications == TOKENS * WORDS * FEATURES


@pytest.mark.parametrize("frozen", (True, False))
def test_ignored_tokens_cost_nothing(frozen: bool) -> None:
    case = case_of(frozen=frozen)
    case.labels[torch.randperm(TOKENS)[: TOKENS * 3 // 4]] = -100
    assert watch(case).multiplications * 4 == watch(case_of(frozen=frozen)).multiplications


def _peak(case: Case) -> int:
    """Bytes above those of the inputs at the highest point, of tensors that torch's allocator gives out."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        case.call().loss.sum().backward()
    held = highest = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def gradient_bytes(case: Case) -> int:
    return sum(x.nbytes for x in case.tensors.values() if x.requires_grad)


@pytest.mark.parametrize(
    "head",
    (
        {},
        {"frozen": False},
        {"frozen": False, "reduction": "none"},
        {"frozen": False, "bias": True, "rank": 4, "label_smoothing": 0.1, "z_loss": 0.1},
        {"storage": "four_bit", "frozen": False, "rank": 4},
        pytest.param({"rank": 4}, marks=pytest.mark.full),
        pytest.param({"frozen": False, "label_smoothing": 0.1, "softcap": 20.0}, marks=pytest.mark.full),
    ),
)
def test_two_percent_of_the_logits(head: dict[str, Any]) -> None:
    """Beyond the gradients, at 1600 tokens and 40,000 words; plain PyTorch takes 200 %."""
    tokens, words = 1600, 40_000
    case = make_case(tokens, words=words, ignored=0.01, **head)
    assert _peak(case) - gradient_bytes(case) < 0.02 * 4 * tokens * words


@pytest.mark.parametrize(
    "head",
    (
        {},
        {"frozen": False},
        {"frozen": False, "bias": True},
        {"frozen": False, "log_probs": True, "z_loss": 0.1},
        {"frozen": False, "rank": 64, "bias": True, "label_smoothing": 0.1},
        {"frozen": False, "label_smoothing": 0.1},
        {"rank": 16, "low": torch.float32},
        {"frozen": False, "hidden_trained": False},
        {"frozen": False, "dtype": torch.float32},
        {"frozen": False, "features": 8192},
        {"frozen": False, "tokens": 100_000, "words": 32_000},
    ),
)
def test_two_percent_of_the_logits_on_a_gpu(head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's allocator would count them, without values; a step of Triton's kernels takes no memory there."""
    steps = SimpleNamespace(**dict.fromkeys(("online_step", "gradient_step", "rescale"), lambda *a, **k: None))
    for module in (forward, recompute):
        monkeypatch.setattr(module, "steps_of", lambda *_: steps)
    asked = {"tokens": 8192, "features": 4096, "words": 128_256, "dtype": torch.bfloat16, "low": None} | head
    tokens, features, words, dtype, low = (asked.pop(name) for name in ("tokens", "features", "words", "dtype", "low"))
    trained = not asked.pop("frozen", True)
    rank, bias, hidden_trained = asked.pop("rank", 0), asked.pop("bias", False), asked.pop("hidden_trained", True)

    def parameter(*shape: int, dtype: torch.dtype = dtype, trained: bool = trained) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)

    hidden, weight = parameter(tokens, features, trained=hidden_trained), parameter(words, features)
    s, b = (parameter(n, rank, dtype=low or dtype, trained=True) if rank else None for n in (tokens, words))
    head_ = Head(weight if trained else DenseWeight(weight), parameter(words) if bias else None, s, b)
    labels, given = torch.empty(tokens, dtype=torch.int64, device="meta"), (hidden, weight, head_.bias, s, b)
    wanted = [x for x in given if x is not None and x.requires_grad]
    live = LiveBytes("cuda")
    live.add([labels, *(x for x in given if x is not None)])
    before = live.live
    with imitating("cuda"), live:
        gradients = torch.autograd.grad(linear_cross_entropy(hidden, head_, labels, **asked).loss, wanted)
    taken = live.peak - before - sum(x.nbytes for x in gradients)
    assert 0.005 < taken / (4 * tokens * words) < 0.02


def test_blocks_on_a_gpu() -> None:
    """At 8192 tokens, 128,256 words and 4096 features in bf16: the sums of a block's tokens, and its logits."""
    device = torch.device("cuda")
    for sizes in (Sizes(logit=2, token=4 * 4096, word=0), Sizes(logit=2, token=4 * 4096, word=2 * 4096)):
        found = choose_blocks(8192, 128_256, sizes, device)
        assert sizes.of(found) <= 0.02 * 4 * 8192 * 128_256
        assert found.tokens >= 1024 and found.words >= 4000
    assert choose_blocks(100, 300, Sizes(2, 4 * 4096, 0), device) == Blocks(100, 300)
    narrow = choose_blocks(4096, 128_256, Sizes(2, 4 * 2048, 0), device)  # more than 2 %, for fewer launches
    assert narrow == Blocks(2048, 8064)


@pytest.mark.parametrize("count", (1, 63, 64, 65, 1000, 128_256))
def test_parts_are_even(count: int) -> None:
    for most in (64, 1024, 8192):
        size = blocks._even(count, most)
        assert 0 < size <= max(most, 1) and -(-count // size) == -(-count // most)
