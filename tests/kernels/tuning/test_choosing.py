"""What an op takes: the user's measurement, the one that was shipped, or its default; never an exception."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastpeft_kernels.tuning import choosing, files
from fastpeft_kernels.tuning.records import Winner

CPU = torch.device("cpu")


class Key(NamedTuple):
    tokens: int
    sizes: tuple[int, ...]


def winner(choice: str, tokens: int = 8) -> Winner:
    return Winner("op", {"tokens": tokens, "sizes": [2, 3]}, choice, {"plain": 2.0, "quick": 1.0})


def chosen(tokens: int = 8, device: torch.device = CPU) -> str:
    return choosing.choice("op", device, lambda: Key(tokens, (2, 3)), lambda _: ("plain", "quick"), "plain")


def keep(folder: Path, *winners: Winner) -> Path:
    name = choosing.device_name(CPU)
    path = files.file_of(name, folder)
    files.add(path, name, winners)
    choosing.forget()
    return path


def test_nothing_measured() -> None:
    assert chosen() == "plain"


def test_what_the_user_measured_comes_before_what_is_shipped(measured_choices: Path) -> None:
    keep(files.SHIPPED, winner("quick"), winner("quick", 16))
    assert (chosen(), chosen(16), chosen(32)) == ("quick", "quick", "plain")
    keep(measured_choices, winner("plain"))
    assert (chosen(), chosen(16)) == ("plain", "quick")


def test_a_number_of_threads_is_a_device_of_its_own(measured_choices: Path) -> None:
    keep(measured_choices, winner("quick"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert chosen() == "plain"
    finally:
        torch.set_num_threads(threads)
    assert chosen() == "quick"


def test_a_device_without_measurements() -> None:
    assert chosen(device=torch.device("meta")) == "plain"


def test_defaults_on_request(measured_choices: Path) -> None:
    keep(measured_choices, winner("quick"))
    choosing.use_tuned(False)
    try:
        assert chosen() == "plain"
    finally:
        choosing.use_tuned(True)
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == "plain"
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen() == "quick"


@pytest.mark.parametrize("content", [b"{", b'{"winners": []}', None])
def test_a_file_that_cannot_be_used_is_ignored_with_one_warning(
    measured_choices: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = keep(measured_choices, winner("quick"))
    path.write_bytes(path.read_bytes().replace(b'"torch": "', b'"torch": "0.') if content is None else content)
    with caplog.at_level(logging.WARNING, "fastpeft"):
        assert [chosen(), chosen(), chosen(16)] == ["plain"] * 3
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "fastpeft tune measures anew" in record.getMessage()


def test_what_is_shipped_serves_with_another_torch(caplog: pytest.LogCaptureFixture) -> None:
    path = keep(files.SHIPPED, winner("quick"))
    path.write_bytes(path.read_bytes().replace(b'"torch": "', b'"torch": "0.'))
    assert chosen() == "quick" and not caplog.records


def test_an_unknown_candidate_is_ignored_with_one_warning(
    measured_choices: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(measured_choices, winner("rm -rf"), winner("eval", 16), winner("quick", 32))
    with caplog.at_level(logging.WARNING, "fastpeft"):
        assert [chosen(), chosen(), chosen(16), chosen(32)] == ["plain", "plain", "plain", "quick"]
    (record,) = caplog.records
    assert "no op of the name 'rm -rf'" in record.getMessage()


def test_what_is_met_is_gathered_once() -> None:
    with choosing.meeting() as met:
        assert [chosen(), chosen(), chosen(16)] == ["plain"] * 3
    chosen(64)
    assert list(met) == [("op", Key(8, (2, 3))), ("op", Key(16, (2, 3)))]


def test_the_current_gpu_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU 9000")
    choosing.learn(torch.device("cuda"), winner("quick"))
    assert [chosen(device=torch.device(name)) for name in ("cuda", "cuda:1", "cuda:0")] == ["quick", "quick", "plain"]


def test_one_thread_at_a_time() -> None:
    """And what it measures may force choices itself."""

    def enter(what: object) -> None:
        with what:  # type: ignore[attr-defined]
            pass

    with ThreadPoolExecutor(1) as other, choosing.alone(), choosing.forced({"op": "quick"}), choosing.meeting() as met:
        for refused in (choosing.alone(), choosing.forced({}), choosing.meeting()):
            with pytest.raises(RuntimeError, match="tune: another thread of this process is tuning"):
                other.submit(enter, refused).result()
        assert other.submit(chosen).result() == "quick" and len(met) == 1
    with ThreadPoolExecutor(1) as other:
        other.submit(enter, choosing.alone()).result()


def test_forced(measured_choices: Path) -> None:
    keep(measured_choices, winner("quick"))
    with choosing.forced({"op": "plain", "other": "x"}):
        assert chosen() == "plain"
    with choosing.forced({"other": "x"}):
        assert chosen() == "quick"
