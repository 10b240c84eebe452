"""Cases of all ops are measured, kept, used at once, and not measured again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastpeft_kernels import tuner
from fastpeft_kernels.activation import gated_activation
from fastpeft_kernels.activation.choosing import BACKWARD, FORWARD, ActivationKey
from fastpeft_kernels.lora.keys import LINEAR, RANK, LinearKey, RankKey
from fastpeft_kernels.lora.projection import Dtypes, LoraProjection
from fastpeft_kernels.mlp import fused
from fastpeft_kernels.mlp.fused import FUSED, FusedKey
from fastpeft_kernels.mlp.structure import Mlp
from fastpeft_kernels.quant import decode_4bit, encode_4bit
from fastpeft_kernels.quant.choosing import DECODE, DecodeKey
from fastpeft_kernels.tuning import choosing, files
from fastpeft_kernels.tuning.records import Winner
from fastpeft_kernels.weights import DenseWeight

CPU = torch.device("cpu")
SILU = ActivationKey(16, 24, "silu", True, "float32")
WEIGHT = DecodeKey(32, 64, "nf4", 64, True, "float32", True)
MLP = FusedKey(16, 64, "silu", True, "bfloat16")
Q, NARROW = LinearKey(16, 64, 64, "bfloat16", False), RankKey(16, 64, 8, "bfloat16")
MET = [(LINEAR, Q), (DECODE, WEIGHT), (FORWARD, SILU), (BACKWARD, SILU), (FUSED, MLP), (RANK, NARROW)]


def test_cases_are_in_the_order_of_the_ops_for_each_number_of_tokens() -> None:
    cases = [(tunable.op, key) for tunable, key in tuner.cases_for([*MET, *MET], CPU, [5, 8, 20])]
    assert [op for op, _ in cases] == [DECODE, *[FORWARD] * 2, *[BACKWARD] * 2]
    assert [key.tokens for op, key in cases if op != DECODE] == [8, 32] * 2
    assert not {LINEAR, RANK, FUSED} & {op for op, _ in cases}  # nothing to choose on a CPU


def test_what_others_are_made_of_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft_kernels.lora.keys.kernels_serve", lambda device: True)
    found = [tunable.op for tunable, _ in tuner.cases_for(MET, CPU, [8])]
    assert found == [DECODE, FORWARD, BACKWARD, RANK, LINEAR, FUSED]


def test_while_choices_are_gathered_an_mlp_s_activation_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what its products ask for would not be met."""
    monkeypatch.setattr("fastpeft_kernels.lora.keys.kernels_serve", lambda device: True)
    half, matrix = torch.bfloat16, DenseWeight(torch.zeros(32, 16, dtype=torch.bfloat16))
    mlp = Mlp((LoraProjection(matrix),) * 2, LoraProjection(DenseWeight(matrix.weight.t())), "silu")
    pre = torch.zeros(4, 64, dtype=half)
    with choosing.forced({FUSED: "fused"}):
        assert fused._chosen(pre, mlp, Dtypes(half, half, half))
        with choosing.meeting() as met:
            assert not fused._chosen(pre, mlp, Dtypes(half, half, half))
    assert list(met) == [(FUSED, FusedKey(4, 32, "silu", True, "bfloat16"))]


def test_every_op_is_measured_kept_and_used(measured_choices: Path) -> None:
    cases = tuner.cases_for(MET, CPU, [8])
    counts: list[int] = []
    found = tuner.tune(cases, CPU, seconds=0.0, progress=counts.append)
    assert counts == [1, 2, 3] and not any(one.dropped or one.reused for one in found)
    winners = [one.winner for one in found]
    assert files.read(files.file_of(choosing.device_name(CPU), measured_choices), choosing.device_name(CPU)) == winners
    again = tuner.tune(cases, CPU, seconds=0.0)
    assert [one.winner for one in again] == winners and all(one.reused for one in again)
    assert not any(one.reused for one in tuner.tune(cases[:1], CPU, seconds=0.0, again=True))


def test_the_caller_s_autocast_and_modes_do_not_count() -> None:
    cases = tuner.cases_for(MET, CPU, [8])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not any(one.dropped for one in tuner.tune(cases, CPU, seconds=0.0))


def test_a_device_that_has_no_clock_here() -> None:
    with pytest.raises(ValueError, match="device: expected a CPU or a CUDA GPU, got meta"):
        tuner.tune([], torch.device("meta"))


def test_a_second_tune_at_the_same_time_is_refused() -> None:
    with ThreadPoolExecutor(1) as other:

        def meanwhile(done: int) -> None:
            with pytest.raises(RuntimeError, match="another thread of this process is tuning"):
                other.submit(tuner.tune, [], CPU).result()

        assert len(tuner.tune(tuner.cases_for(MET[1:2], CPU, [8]), CPU, seconds=0.0, progress=meanwhile)) == 1


def test_an_interrupt_loses_nothing(measured_choices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.tune(tuner.cases_for(MET, CPU, [8]), CPU, seconds=0.0, progress=stop)
    (path,) = measured_choices.glob("*.json")
    assert [winner.op for winner in files.read(path, choosing.device_name(CPU))] == [DECODE, FORWARD]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        tuner.tune(tuner.cases_for(MET[1:2], CPU, [8]), CPU, folder=tmp_path / "file" / "folder", seconds=0.0)
    assert choosing.choice(DECODE, CPU, lambda: WEIGHT, lambda _: ("torch", "native"), "none") in ("torch", "native")


@pytest.mark.parametrize("backend", ("torch", "native"))
def test_decoding_and_activation_take_the_winner(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    native = (
        "fastpeft_kernels.quant.custom_op.decode_4bit_native",
        "fastpeft_kernels.activation.api.gated_activation_native",
    )
    for name in native:
        module, _, function = name.rpartition(".")
        real = getattr(__import__(module, fromlist=[function]), function)
        monkeypatch.setattr(name, lambda *args, real=real: taken.append("native") or real(*args))
    for op, key in ((DECODE, WEIGHT), (FORWARD, SILU)):
        choosing.learn(CPU, Winner(op, key._asdict(), backend, {backend: 1.0}))
    decode_4bit(encode_4bit(torch.randn(32, 64), nested=True))
    gated_activation(torch.randn(12, 24), torch.randn(12, 24), "silu")
    assert taken == (["native"] * 2 if backend == "native" else [])
