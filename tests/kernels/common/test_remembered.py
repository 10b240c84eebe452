"""What is derived from the same tensors is derived once; from anything else anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.attention import query_ranges, relative
from fastpeft_kernels.attention.ranges import packed
from fastpeft_kernels.common.remembered import Remembered, forgetful


class Doubling(Remembered[Tensor]):
    """Twice a tensor, plus a number; notes each time that it is made."""

    def __init__(self, most: int = 4) -> None:
        super().__init__(self._made, most)
        self.made = 0

    def _made(self, x: Tensor, number: int = 0) -> Tensor:
        self.made += 1
        return x * 2 + number


def test_the_same_tensor_and_views_of_it_that_are_alike() -> None:
    double, x = Doubling(), torch.arange(6)
    first = double(x, 1)
    assert double(x, 1) is first and double(x.detach(), 1) is first and double(x[:], 1) is first
    assert double.made == 1 and torch.equal(first, x * 2 + 1)


@pytest.mark.parametrize(
    "other",
    [lambda x: x.clone(), lambda x: x[1:], lambda x: x[::2], lambda x: x.view(2, 3), lambda x: x.view(torch.int32)],
)
def test_another_one(other: Any) -> None:
    double, x = Doubling(), torch.arange(6)
    double(x)
    assert torch.equal(double(other(x)), other(x) * 2) and double.made == 2


def test_another_number_a_write_and_new_memory_at_the_same_place() -> None:
    double, x = Doubling(), torch.arange(6)
    double(x)
    double(x, 3)
    x.add_(1)
    assert torch.equal(double(x), x * 2) and double.made == 3
    for i in range(20):
        x = torch.full((6,), i)
        assert torch.equal(double(x), x * 2)
        del x
    assert double.made == 23


def test_what_a_fused_optimizer_writes_without_a_version() -> None:
    double = Doubling()
    trained = torch.nn.Parameter(torch.arange(6.0))
    for x in (lambda: trained[:4], lambda: trained.view(2, 3)):
        double(x())
        double(x())
    assert double.made == 4
    made_of_it, frozen = trained * 1, torch.nn.Parameter(torch.arange(6.0), requires_grad=False)[:4]
    for x in (made_of_it, made_of_it[:4], frozen):
        double.made = 0
        double(x)
        double(x)
        assert double.made == 1


def test_nothing_is_kept_where_it_must_not() -> None:
    double, x = Doubling(), torch.arange(6)
    with forgetful():
        double(x)
        double(x)
    assert double.made == 2 and not double._entries
    double(x)
    assert double(x) is double(x) and double.made == 3


@pytest.mark.parametrize("write", [lambda x: x.numpy().__iadd__(1), lambda x: x.data.add_(1)])
def test_a_write_that_torch_does_not_count(write: Any) -> None:
    double, x = Doubling(), torch.arange(6)
    double(x)
    write(x)
    assert torch.equal(double(x), x * 2) and double(x) is double(x) and double.made == 2


def test_the_oldest_goes() -> None:
    double, tensors = Doubling(most=2), [torch.arange(6) for _ in range(3)]
    for x in tensors:
        double(x)
    double(tensors[2])
    double(tensors[1])
    assert double.made == 3
    double(tensors[0])
    assert double.made == 4


def test_nothing_in_inference_mode_serves_training() -> None:
    double, x = Doubling(), torch.arange(6)
    with torch.inference_mode():
        assert double(x).is_inference()
        y = torch.arange(6)
        double(y)
        double(y)  # has no version
    assert not double(x).is_inference() and double.made == 4


def test_nothing_where_operations_are_recorded() -> None:
    double = Doubling()
    with FakeTensorMode():
        x = torch.arange(6)
        double(x)
        double(x)
    x = torch.arange(6.0)
    torch.func.grad(lambda w: double(x).sum() * w)(torch.ones(()))
    torch.func.grad(lambda w: double(x).sum() * w)(torch.ones(()))
    assert double.made == 4


def test_a_recomputed_layer_finds_what_its_forward_made() -> None:
    double, x, w = Doubling(), torch.arange(6), torch.ones((), requires_grad=True)
    for use_reentrant in (False, True):
        checkpoint(lambda w: (double(x) * w).sum().sin(), w, use_reentrant=use_reentrant).backward()
    assert double.made == 1


def test_ranges_of_blocks_are_made_once_for_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    ranges = query_ranges._of_blocks
    monkeypatch.setattr(
        query_ranges, "_of_blocks", Remembered(lambda *args: made.append(args[3]) or ranges.make(*args))
    )
    mask = packed(torch.tensor([0, 3, 9], dtype=torch.int32), 9)
    assert mask.start is not None and mask.stop is not None
    found = [query_ranges.of_blocks(mask.start, mask.stop, 9, block) for block in (4, 4, 2)]
    assert made == [4, 2] and found[0] is found[1]
    assert torch.equal(found[0], ranges.make(mask.start, mask.stop, 9, 4))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 2), (torch.bfloat16, 4)])
def test_layers_with_one_bias_by_distance_share_its_copies(dtype: torch.dtype, copies: int, reverse: bool) -> None:
    bias = torch.randn(3, 11).to(dtype).requires_grad_() * 1  # as T5 makes it in each forward
    found = relative.in_copies(bias, reverse)
    assert found.shape[:2] == (3, copies) and not found.requires_grad
    wanted = bias.detach().flip(1) if reverse else bias.detach()
    for c in range(copies):
        first = relative.MARGIN - c
        assert torch.equal(found[:, c, first : first + 11], wanted)
        assert not found[:, c, :first].any() and not found[:, c, first + 11 :].any()
    assert relative.in_copies(bias[:, :], reverse) is found
    with torch.no_grad():
        bias.mul_(2)
    assert torch.equal(relative.in_copies(bias, reverse), found * 2)
