"""A head's lazy logits: values, losses and gradients of the plain head, whatever is done with them."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.layers import head_call
from fastpeft.layers.head import FEW, FastHead, make_head, unmake_head
from fastpeft.layers.head_call import HeadCall, LossCalls
from fastpeft.layers.lazy_logits import LazyLogits, plain
from tests.budget import assert_within_budget

ROWS, TOKENS, HIDDEN, WORDS = 2, 5, 8, 11


@pytest.fixture(autouse=True)
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_call, "FEW_ON_CPU", 0)
    monkeypatch.setattr(head_call, "FEW_SLOW_ON_CPU", 0)


class Pair:
    """The same head twice, ours lazy, and the same hidden states twice."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, trained: bool = True, bias: bool = True) -> None:
        self.theirs = nn.Linear(HIDDEN, WORDS, bias=bias).to(dtype).requires_grad_(trained)
        self.ours: Any = copy.deepcopy(self.theirs)
        make_head(self.ours)
        self.calls = self.ours.fastpeft_loss = LossCalls()
        self.calls.labelled = 1
        self.x = torch.randn(ROWS, TOKENS, HIDDEN).to(dtype).requires_grad_()
        self.labels = torch.randint(0, WORDS, (ROWS, TOKENS))
        self.labels[0, 2:] = -100

    def both(self, work: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The result of `work` on the logits, and the gradients of its sum: ours, theirs."""
        found = []
        for head in (self.ours, self.theirs):
            x = self.x.detach().requires_grad_()
            result = work(head(x))
            if result.requires_grad:
                result.sum().backward()
            parameters = [x, *head.parameters()]
            found.append([plain(result).detach(), *(p.grad for p in parameters if p.grad is not None)])
            head.zero_grad()
        return found[0], found[1]

    def truth(self, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
        wide = copy.deepcopy(self.theirs).double()
        x = self.x.detach().double().requires_grad_()
        result = work(wide(x))
        result.sum().backward()
        return [result.detach(), *(p.grad for p in (x, *wide.parameters()) if p.grad is not None)]


@contextmanager
def never_made() -> Iterator[None]:
    """Within it nobody may make logits."""

    def refuse(call: HeadCall) -> Tensor:
        raise AssertionError("logits were made")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadCall, "logits", refuse)
        yield


def shifted(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """As models shifted logits themselves."""
    return lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, WORDS), labels[..., 1:].reshape(-1))


def flat(z: Tensor) -> Tensor:
    return z.float().view(-1, z.size(-1)) if z.dtype != torch.float64 else z.view(-1, z.size(-1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda z, y: F.cross_entropy(flat(z), y.view(-1)),
    "sum": lambda z, y: F.cross_entropy(flat(z), y.view(-1), reduction="sum"),
    "none": lambda z, y: F.cross_entropy(flat(z), y.view(-1), reduction="none"),
    "class": lambda z, y: nn.CrossEntropyLoss(label_smoothing=0.1)(z.view(-1, WORDS), y.view(-1)),
    "weights": lambda z, y: F.cross_entropy(flat(z), y.view(-1), torch.linspace(0.5, 2, WORDS).to(flat(z).dtype)),
    "ignored": lambda z, y: F.cross_entropy(flat(z), y.clamp(min=3).view(-1), ignore_index=3),
    "shifted": lambda z, y: shifted(y)(z),
    "soft cap": lambda z, y: F.cross_entropy(flat(torch.tanh(z / 3.0) * 3.0), y.view(-1)),
    "scaled": lambda z, y: F.cross_entropy(flat(z * 0.25 / 2), y.view(-1)),
    "scaled and capped": lambda z, y: F.cross_entropy(flat(torch.tanh(z * 0.5) * 4.0 * 0.5), y.view(-1)),
    "bias": lambda z, y: F.cross_entropy(flat(z + torch.arange(WORDS).to(z)[None] / 5), y.view(-1)),
    "row": lambda z, y: F.cross_entropy(z[0], y[0]),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("trained", [True, False])
def test_losses_need_no_logits(name: str, trained: bool) -> None:
    pair = Pair(trained=trained, bias=name != "bias")

    def work(z: Tensor) -> Tensor:
        return LOSSES[name](z, pair.labels)

    with never_made():
        ours, theirs = pair.both(work)
    assert len(ours) == len(theirs) == 2 + trained * (1 + (name != "bias"))
    for mine, other, exact in zip(ours, theirs, pair.truth(work), strict=False):
        assert_within_budget(mine, other, exact)
    assert pair.calls.outcomes == {"fused": 1}


@pytest.mark.parametrize("write", ["leaf", "result"])
def test_a_trained_bias_that_is_written_to_before_the_loss(write: str) -> None:
    """The loss is of the values that were added, and so are the gradients: from logits."""
    pair = Pair(bias=False)
    start = torch.randn(WORDS)
    found = []
    for head in (pair.ours, pair.theirs):
        leaf = start.clone().requires_grad_()
        bias = leaf if write == "leaf" else leaf * 2
        z = head(pair.x) + bias
        if write == "leaf":
            with torch.no_grad():
                bias.add_(1.0)
        else:
            bias.mul_(3.0)
        loss = F.cross_entropy(flat(z), pair.labels.view(-1))
        found.append((loss.detach(), *torch.autograd.grad(loss, [leaf, head.weight])))
    torch.testing.assert_close(*found)
    assert "a write to a bias" in next(iter(pair.calls.outcomes))


@pytest.mark.parametrize(("dtype", "slow"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_few_logits_are_made_on_a_cpu(dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a number, in 16 bits another where these are slow; a proof leaves them out all the same."""
    pair, multiplied = Pair(dtype), dtype.itemsize == 2 and slow
    monkeypatch.setattr(head_call, "product_dtype", lambda d, _: torch.float32 if slow else d)
    name = "FEW_SLOW_ON_CPU" if multiplied else "FEW_ON_CPU"
    monkeypatch.setattr(head_call, name, ROWS * TOKENS * WORDS)
    assert type(pair.ours(pair.x)) is Tensor and pair.calls.outcomes == {FEW: 1}
    pair.calls.records = []
    assert type(pair.ours(pair.x)) is LazyLogits
    pair.calls.records = None
    monkeypatch.setattr(head_call, name, ROWS * TOKENS * WORDS - 1)
    assert type(pair.ours(pair.x)) is LazyLogits


@pytest.mark.parametrize("shape", [(WORDS,), (1, 1, WORDS)])
def test_a_bias_added_outside_the_head_is_trained(shape: tuple[int, ...]) -> None:
    """As the heads of ESM and other encoders add theirs."""
    pair = Pair(bias=False)
    bias = torch.randn(shape)

    def gradient(head: Any, bias: Tensor) -> Tensor:
        leaf = bias.clone().requires_grad_()
        z = head(pair.x.to(bias.dtype)) + leaf * 2
        (found,) = torch.autograd.grad(F.cross_entropy(flat(z), pair.labels.view(-1)), leaf)
        return found

    with never_made():
        ours = gradient(pair.ours, bias)
    wide = copy.deepcopy(pair.theirs).double()
    assert_within_budget(ours, gradient(pair.theirs, bias), gradient(wide, bias.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_loss(dtype: torch.dtype) -> None:
    pair = Pair(dtype)
    for autocast in (False, True):
        for cast in (lambda z: z, lambda z: z.float()):
            with never_made(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                mine, other = (
                    F.cross_entropy(cast(head(pair.x)).view(-1, WORDS), pair.labels.view(-1))
                    for head in (pair.ours, pair.theirs)
                )
            assert mine.dtype == other.dtype
            torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


def test_under_autocast() -> None:
    pair = Pair()
    work = LOSSES["mean"]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = pair.both(lambda z: work(z, pair.labels))
        read = pair.ours(pair.x)
    assert read.dtype == torch.bfloat16
    torch.testing.assert_close(plain(read), pair.theirs(pair.x).to(torch.bfloat16), rtol=2e-2, atol=2e-2)
    for mine, other, exact in zip(ours, theirs, pair.truth(lambda z: work(z, pair.labels)), strict=True):
        assert mine.dtype == other.dtype
        assert (mine - exact).norm() <= 2 * (other - exact).norm() + 2**-8 * exact.norm()


def written(z: Tensor) -> Tensor:
    z[:, :, 3] = -5.0
    return z


def written_through_a_view(z: Tensor) -> Tensor:
    z.view(-1, WORDS)[:, 2].fill_(0.5)
    return z * 2


def derived_then_written(z: Tensor) -> Tensor:
    half = z * 0.5
    z.mul_(3.0)
    return half + z


class Squared(torch.autograd.Function):
    """A function that torch's dispatcher does not see as a whole."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda z: z.sum(),
    "log-softmax": lambda z: F.log_softmax(z.float(), -1).gather(-1, torch.ones(ROWS, TOKENS, 1, dtype=torch.int64)),
    "itself": lambda z: z,
    "a part of each row": lambda z: z[..., :4] ** 2,
    "rows by mask": lambda z: z[torch.arange(TOKENS).remainder(2).bool().expand(ROWS, -1)] ** 2,
    "words by index": lambda z: z[:, :, [1, 3]].exp(),
    "transposed": lambda z: F.cross_entropy(z.transpose(1, 2), torch.ones(ROWS, TOKENS, dtype=torch.int64)),
    "tanh twice": lambda z: torch.tanh(torch.tanh(z)),
    "negative scale": lambda z: F.cross_entropy(flat(torch.tanh(z)) * -2.0, torch.ones(10, dtype=torch.int64)),
    "written": lambda z: written(z) ** 2,
    "written through a view": lambda z: written_through_a_view(z),
    "written after another was made of it": lambda z: derived_then_written(z),
    "a function of one's own": lambda z: Squared.apply(z.float()),  # type: ignore[no-untyped-call]
    "read, then a loss": lambda z: z.argmax(-1).sum() * 0 + F.cross_entropy(flat(z), torch.ones(10, dtype=torch.int64)),
    "probabilities as labels": lambda z: F.cross_entropy(flat(z), torch.full((10, WORDS), 1 / WORDS)),
    "split": lambda z: torch.cat([part.exp() for part in z.split(2, 1)], 1),
}


@pytest.mark.parametrize("name", READS)
def test_whoever_reads_them_gets_them(name: str) -> None:
    pair = Pair()
    ours, theirs = pair.both(READS[name])
    assert [type(each) for each in ours] == [Tensor] * len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert sum(pair.calls.outcomes.values()) == 1 and "fused" not in pair.calls.outcomes


def test_they_are_made_once() -> None:
    pair = Pair()
    z = pair.ours(pair.x)
    assert type(z) is LazyLogits and z.shape == (ROWS, TOKENS, WORDS) and z.requires_grad
    z.sum()
    with never_made():
        torch.testing.assert_close(plain(z.float() * 2), pair.theirs(pair.x) * 2)
    assert pair.calls.outcomes == {"logits asked for before a loss, by aten.sum.default": 1}


def test_after_their_loss() -> None:
    pair = Pair()
    z = pair.ours(pair.x)
    LOSSES["mean"](z, pair.labels).backward()
    torch.testing.assert_close(plain(z), pair.theirs(pair.x))
    (outcome,) = [why for why, count in pair.calls.outcomes.items() if count]
    assert outcome.startswith("logits asked for after a loss, by ")


def test_outside_torch(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()
    values = pair.theirs(pair.x).detach()
    with caplog.at_level(logging.INFO, "fastpeft"):
        assert "LazyLogits" not in repr(pair.ours(pair.x))
    assert "loss=False" in caplog.text
    torch.testing.assert_close(torch.from_numpy(pair.ours(pair.x).detach().numpy()), values)
    torch.testing.assert_close(torch.tensor(pair.ours(pair.x).tolist()), values)
    assert pair.ours(pair.x).data_ptr()
    for copied in (pickle.loads(pickle.dumps(pair.ours(pair.x).detach())), copy.deepcopy(pair.ours(pair.x).detach())):
        assert type(copied) is Tensor
        torch.testing.assert_close(copied, values)
    file = io.BytesIO()
    torch.save(pair.ours(pair.x), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file).detach(), values)


class TestHooks:
    def test_before_the_loss(self) -> None:
        pair = Pair()
        seen: list[Tensor] = []

        def work(z: Tensor) -> Tensor:
            z.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)  # type: ignore[func-returns-value]
            return LOSSES["mean"](z, pair.labels)

        ours, theirs = pair.both(work)
        torch.testing.assert_close(seen[0], seen[1])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)

    def test_a_kept_gradient(self) -> None:
        pair = Pair()
        kept = []
        for head in (pair.ours, pair.theirs):
            z = head(pair.x)
            z.retain_grad()
            LOSSES["mean"](z, pair.labels).backward()
            kept.append(z.grad)
        torch.testing.assert_close(kept[0], kept[1])

    def test_after_the_loss_the_log_says_that_none_comes(self, caplog: pytest.LogCaptureFixture) -> None:
        pair = Pair()
        z = pair.ours(pair.x)
        loss = LOSSES["mean"](z, pair.labels)
        with caplog.at_level(logging.INFO, "fastpeft"):
            z.retain_grad()
        assert "no gradient reaches these logits" in caplog.text
        loss.backward()
        assert z.grad is None
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(LOSSES["mean"](pair.ours(pair.x), pair.labels), pair.ours(pair.x))


class TestGradients:
    def test_cut_off(self) -> None:
        pair = Pair()
        assert not LOSSES["mean"](pair.ours(pair.x).detach(), pair.labels).requires_grad
        cut = pair.ours(pair.x).detach().requires_grad_()
        LOSSES["mean"](cut, pair.labels).backward()
        assert cut.grad is not None and pair.x.grad is None

    def test_none_wanted(self) -> None:
        pair = Pair()
        with torch.no_grad(), never_made():
            loss = LOSSES["mean"](pair.ours(pair.x), pair.labels)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, LOSSES["mean"](pair.theirs(pair.x), pair.labels).detach())

    def test_twice(self) -> None:
        pair = Pair()
        z = pair.ours(pair.x)
        (z.sum() + LOSSES["mean"](z, pair.labels)).backward(retain_graph=True)
        assert pair.x.grad is not None
        once = pair.x.grad.clone()
        (z * 1).sum().backward()
        wanted = pair.theirs.weight.sum(0).expand_as(pair.x)
        torch.testing.assert_close(pair.x.grad - once, wanted, rtol=1e-4, atol=1e-5)


class TestChangesBeforeTheyAreRead:
    @pytest.mark.parametrize(
        "change",
        [
            lambda pair: torch.optim.AdamW(pair.ours.parameters(), fused=True).step(),
            lambda pair: pair.ours.weight.data.add_(1.0),
            lambda pair: pair.kept.add_(1.0),
            lambda pair: pair.ours.weight.untyped_storage().resize_(0),  # as FSDP2 frees it after backward
        ],
        ids=["optimizer", "weight", "hidden states", "freed"],
    )
    def test_are_an_error(self, change: Callable[[Any], Any]) -> None:
        pair: Any = Pair()
        pair.kept = pair.x.detach() * 1
        z = pair.ours(pair.kept)
        LOSSES["mean"](z, pair.labels).backward()
        change(pair)
        with pytest.raises(RuntimeError, match="logits: expected to be read before"):
            z.sum()

    def test_elsewhere_are_none(self) -> None:
        pair = Pair(trained=False)
        z = pair.ours(pair.x)
        LOSSES["mean"](z, pair.labels).backward()
        torch.optim.AdamW([pair.x.detach().requires_grad_()], fused=True).step()
        torch.testing.assert_close(plain(z), pair.theirs(pair.x))


def test_without_labels_or_with_hooks_the_head_is_plain() -> None:
    pair = Pair()
    pair.calls.labelled = 0
    assert type(pair.ours(pair.x)) is Tensor and not pair.calls.outcomes
    pair.calls.labelled = 1
    pair.ours.register_forward_hook(lambda *_: None)
    assert type(pair.ours(pair.x)) is Tensor
    assert pair.calls.outcomes == {"a hook on a bypassed Linear": 1}


def test_wrong_input_fails_as_before() -> None:
    pair = Pair()
    for wrong in (pair.x.double(), pair.x[..., :3]):
        messages = []
        for head in (pair.ours, pair.theirs):
            with pytest.raises(RuntimeError) as caught:
                F.cross_entropy(head(wrong).view(-1, WORDS), pair.labels.view(-1))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    z = pair.ours(pair.x)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        z.view(7, WORDS)
    with pytest.raises(ValueError, match="to match target batch_size"):
        F.cross_entropy(z.view(-1, WORDS), pair.labels[0])


def test_copies_and_pickles() -> None:
    pair = Pair()
    for head in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):
        assert isinstance(head, FastHead) and isinstance(head, nn.Linear)
        with never_made():
            LOSSES["mean"](head(pair.x), pair.labels)
        unmake_head(head)
        assert type(head) is nn.Linear and "fastpeft_loss" not in head.__dict__
