"""The fixtures that other tests lean on."""

from pathlib import Path

import pytest
import torch


def test_the_seed_fixture_seeds_torch(seed: int) -> None:
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_torch_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("nan_filled")
def test_uninitialised_memory_is_poisoned() -> None:
    x = torch.ones(3, requires_grad=True)
    for y in (
        torch.empty(3),
        torch.empty_like(x),
        torch.empty_strided((3,), (1,)),
        x.new_empty(3),
        x.new_empty_strided((3,), (1,)),
    ):
        assert y.isnan().all()
    assert torch.empty(3, requires_grad=True).requires_grad
    assert torch.empty(2, dtype=torch.int8).tolist() == [127, 127]
    assert torch.empty(2, dtype=torch.bool).all()
    assert torch.empty(2, device="meta").shape == (2,)


def test_poisoning_ends_with_the_test() -> None:
    assert not hasattr(torch.empty, "__wrapped__")
    assert torch.empty.__module__ is None or "conftest" not in torch.empty.__module__


def test_real_models_is_a_folder(real_models: Path) -> None:
    assert real_models.is_dir()
