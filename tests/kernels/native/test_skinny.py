"""Products of rank width in C++: each within its budget, wherever a tile, a panel or a block of rows ends."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft_kernels.lora import rank_products
from fastpeft_kernels.native import native_library, skinny, skinny_serves
from tests.budget import assert_within_budget

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler here")


def empty(*shape):
    return torch.full(shape, float("nan"))


def operands(tokens, features, rank):
    """y, b and s as columns of larger matrices, as an op's are."""
    y, b, s = torch.randn(tokens, features + 3), torch.randn(rank, features), torch.randn(tokens, rank + 2)
    return y[:, 1:-2], b.t(), s[:, 2:]


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("tokens, features", [(1, 1), (5, 129), (12, 128), (119, 127), (241, 300), (500, 257)])
def test_both_products_within_their_budget(tokens, features, rank):
    y, b, s = operands(tokens, features, rank)
    ds, db = empty(tokens, rank + 1)[:, :rank], empty(rank, features).t()
    skinny(y, b=b, ds=ds, s=s, db=db)
    assert_within_budget(ds, y @ b, y.double() @ b.double(), "ds")
    assert_within_budget(db, y.t() @ s, y.double().t() @ s.double(), "db")
    alone = empty(tokens, rank), empty(features, rank)
    skinny(y, b=b, ds=alone[0])
    skinny(y, s=s, db=alone[1])
    assert torch.equal(alone[0], ds) and torch.equal(alone[1], db)


def test_each_number_of_threads_gives_it():
    y, b, s = operands(700, 600, 16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            first, again = ((empty(700, 16), empty(600, 16)) for _ in range(2))
            for ds, db in (first, again):
                skinny(y, b=b, ds=ds, s=s, db=db)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
            assert_within_budget(first[0], y @ b, y.double() @ b.double(), f"ds, {threads} threads")
            assert_within_budget(first[1], y.t() @ s, y.double().t() @ s.double(), f"db, {threads} threads")
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_where_it_belongs():
    y, b, s = operands(30, 140, 5)
    y[3, 130], y[29, 0], b[7, 2] = float("nan"), float("inf"), float("-inf")
    ds, db = empty(30, 5), empty(140, 5)
    skinny(y, b=b, ds=ds, s=s, db=db)
    for ours, theirs in ((ds, y @ b), (db, y.t() @ s)):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours[~ours.isfinite()], theirs[~theirs.isfinite()], equal_nan=True)


def test_nothing_but_large_fp32_of_small_rank_on_a_cpu_goes_there():
    y, s = torch.randn(200, 200), torch.randn(200, 8)
    assert skinny_serves(y, s)
    assert not skinny_serves(y.double(), s.double()) and not skinny_serves(y, s.bfloat16())
    assert not skinny_serves(y.t(), s) and not skinny_serves(y[:10], s[:10])
    assert not skinny_serves(y, torch.randn(200, 33)) and not skinny_serves(y.to("meta"), s.to("meta"))


def test_what_has_no_memory_of_its_own_does_not_go_there():
    y, s = torch.randn(200, 200), torch.randn(200, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(y)
    assert not skinny_serves(fake, s) and not skinny_serves(y, mode.from_tensor(s))
    found = []
    torch.vmap(lambda rows: found.append(skinny_serves(rows, s)) or rows)(torch.randn(3, 200, 200))
    assert found == [False]


def test_without_it_the_library_serves(monkeypatch):
    y, b, s = (torch.randn(200, 200), torch.randn(200, 8), torch.randn(200, 8))

    def results():
        ds = empty(200, 8)
        return rank_products.project_down(y, b), rank_products.both_gradients(y, b, s, ds, s.dtype), ds

    native = results()
    monkeypatch.setattr(rank_products, "skinny_serves", lambda *_: False)
    for ours, theirs in zip(native, results(), strict=True):
        assert ours.shape == theirs.shape and ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
