"""The working set of a streamed 4-bit base on a CPU: packed weights in the ring, and what is decoded of them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
from torch import Tensor

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.streaming.stowing import Bundle
from fastpeft_kernels.common.scratch import release_scratch
from fastpeft_kernels.weights import FourBitWeight
from tests.integration.models import batch, make_base, with_lora
from tests.integration.quantised import quantise
from tests.integration.steps import step
from tests.memory.streaming.test_streaming import _small, ring_of  # noqa: F401
from tests.memory.test_policies import seeded

LARGEST = 64 * 128 * 4
"""Bytes of the largest decoded weight of the tiny model, of its MLP."""


class WorkingSet:
    """Bytes of streamed weights that have memory, and of decoded ones that somebody holds; the most of both at once."""

    def __init__(self, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundles, self.peak, self.packed = bundles, 0, 0
        self.decoded: dict[int, Any] = {}
        decode, fill = FourBitWeight.decode, Bundle.fill

        def decoding(weight: FourBitWeight, *args: Any, **given: Any) -> Tensor:
            found = decode(weight, *args, **given)
            storage = found.untyped_storage()
            self.decoded[storage._cdata] = weakref.ref(storage)
            self.note()
            return found

        def filling(bundle: Bundle, *args: Any) -> None:
            fill(bundle, *args)
            self.note()

        monkeypatch.setattr(FourBitWeight, "decode", decoding)
        monkeypatch.setattr(Bundle, "fill", filling)

    def note(self) -> None:
        packed = sum(s.there.untyped_storage().nbytes() for bundle in self.bundles for s in bundle.stowed)
        held = [storage.nbytes() for ref in self.decoded.values() if (storage := ref()) is not None]
        self.packed, self.peak = max(self.packed, packed), max(self.peak, packed + sum(held))


@pytest.mark.parametrize(
    ("ring", "room", "how"),
    [
        (2, 0, "recompute"),
        (1, LARGEST, "recompute"),
        *[pytest.param(ring, room, how, marks=pytest.mark.full)
          for ring in (1, 3) for room in (0, 1 << 30) for how in ("keep", "recompute", "offload")],
    ],
)  # fmt: skip
def test_no_more_is_resident_than_the_policy_says(
    ring: int, room: int, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's packed weights for each place, one decoded weight, and those that the policy lets wait."""
    model = fastpeft.accelerate(with_lora(quantise(make_base(num_hidden_layers=6)), lora_dropout=0.3))
    given = batch(model)
    step(model, given)
    wanted = seeded(model, given)
    policy = MemoryPolicy(LayerPolicy(how, streamed=True), ring=ring, decoded=room)
    bundles = ring_of(fastpeft.accelerate(model, memory=policy)).bundles
    release_scratch()
    found = WorkingSet(bundles, monkeypatch)
    assert seeded(model, given).equals(wanted)
    layer = max(bundle.nbytes for bundle in bundles)
    waiting = min(room, 2 * 64 * 64 * 4 + 2 * 64 * 32 * 4 + 3 * LARGEST) if how != "keep" else 0
    assert found.packed == ring * layer
    assert ring * layer + LARGEST <= found.peak <= ring * layer + LARGEST + waiting
    assert not waiting or found.peak > ring * layer + LARGEST
