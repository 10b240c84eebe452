"""When copies hide, by hand."""

from __future__ import annotations

import pytest

from fastpeft.memory.plan.transfer import Transfer, tokens_to_hide


def test_a_layer_by_hand() -> None:
    """1000 elements of half a byte at 50 bytes/s: 10 s a copy; 2 tokens are 4000 operations at 1000/s: 4 s."""
    layer = Transfer(tokens=2, elements=1000, nbytes=500, link=50.0, speed=1000.0)
    assert (layer.copy, layer.forward, layer.backward) == (10.0, 4.0, 8.0)
    assert layer.hidden == pytest.approx((4 + 8) / 20) and layer.waited == pytest.approx(6 + 2)
    kept = Transfer(2, 1000, 500, 50.0, 1000.0, recomputed=False)
    assert kept.backward == 4.0 and kept.hidden == pytest.approx(8 / 20) and kept.waited == pytest.approx(12)


def test_from_how_many_tokens_on_all_of_it_hides() -> None:
    assert tokens_to_hide(1000, 500, 50.0, 1000.0) == 5
    for tokens, hidden in ((4, (8 + 10) / 20), (5, 1.0), (50, 1.0)):
        assert Transfer(tokens, 1000, 500, 50.0, 1000.0).hidden == pytest.approx(hidden)
    assert Transfer(50, 1000, 500, 50.0, 1000.0).waited == 0
    assert tokens_to_hide(10**9, 515_900_000, 25e9, 400e12) == pytest.approx(4127, abs=1)
    assert tokens_to_hide(10**9, 2 * 10**9, 25e9, 400e12) == pytest.approx(16000)


def test_what_is_no_layer() -> None:
    with pytest.raises(ValueError, match="tokens: expected more than 0, got 0"):
        Transfer(0, 1, 1, 1.0, 1.0)
