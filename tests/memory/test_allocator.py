"""Segments that grow, where the user has not decided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft.memory.allocator import grow_segments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocator is told, on a GPU that nobody has configured."""
    found: list[str] = []
    grow_segments.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    yield found  # type: ignore[misc]
    grow_segments.cache_clear()


def test_torch_is_told_once(asked: list[str]) -> None:
    grow_segments()
    grow_segments()
    assert asked == ["expandable_segments:True"]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_other_settings_stay(name: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    grow_segments()
    assert asked == ["max_split_size_mb:128,expandable_segments:True"]


@pytest.mark.parametrize("chosen", ["True", "False"])
def test_what_the_user_chose_stays(chosen: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", f"expandable_segments:{chosen}")
    grow_segments()
    assert not asked


@pytest.mark.parametrize("here", [("is_available", False), ("get_allocator_backend", "cudaMallocAsync")])
def test_nothing_without_torch_s_allocator(
    here: tuple[str, Any], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, here[0], lambda: here[1])
    grow_segments()
    assert not asked


def test_older_torch_is_told_another_way(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    grow_segments()
    assert asked == ["expandable_segments:True"]
