"""What a layer costs beside its arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from fastpeft.bench import overhead


@pytest.mark.parametrize("adapted", [True, False])
def test_every_part_beside_peft(adapted: bool) -> None:
    found = overhead.measure(1, adapted)
    assert set(found) == ({"projection", "MLP"} if adapted else {"MLP"})
    for peers in found.values():
        assert set(peers) == {"PEFT", "fastpeft"} and all(forward > 0 for forward, _ in peers.values())


def test_each_peer_is_measured_by_its_own_module() -> None:
    class Slow:
        def __call__(self, x: Any) -> Any:
            for _ in range(20_000):
                pass
            return x * 1

    found = overhead._measure({"quick": lambda x: x * 1, "slow": Slow()}, 2)  # type: ignore[dict-item]
    assert found["slow"][0] > 5 * found["quick"][0]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--rounds", "1"]) == 0
    assert capsys.readouterr().out.count(" us") == 2 * 2 * 3
