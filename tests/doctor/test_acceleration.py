"""What would be accelerated, given what the other checks found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fastpeft.doctor import acceleration
from fastpeft.doctor.findings import Finding, Status, note, ok, problem, warning
from fastpeft.doctor.machine import Machine, Torch
from tests.doctor.machines import CPU_ONLY, H200, T4, WORKING, cuda_torch, machine

EARLIER = {
    "torch": ok("torch", ""),
    "transformers": ok("transformers", ""),
    "peft": ok("peft", ""),
    "triton": ok("triton", "", version="3.7.1", runs=True),
    "bitsandbytes": ok("bitsandbytes", "", four_bit=True),
    "compiler": ok("compiler", "", cxx="c++ 14"),
}
BROKEN_TRITON = problem("triton", "", "Do.", version="3.7.1", runs=False)
NO_TRITON = warning("triton", "", "Do.", version=None, runs=None)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    monkeypatch.setattr(acceleration, "lora_error", lambda device: "")

    def run(machine: Machine, *changed: Finding) -> dict[str, Finding]:
        earlier = EARLIER | {finding.name: finding for finding in changed}
        return {finding.name: finding for finding in acceleration.acceleration(machine, earlier)}

    return run


def test_on_a_gpu(judge: Callable[..., dict[str, Finding]]) -> None:
    found = judge(WORKING)
    assert found["lora"].values == {"accelerated": True, "products": "library", "dropout": "triton"}
    assert found["lora 4-bit"].values == {"accelerated": True, "products": "library", "decode": "triton"}
    assert "products on Hopper, elsewhere where fastpeft tune finds them faster" in found["triton kernels"].text
    assert {finding.status for finding in found.values()} == {Status.ok}


@pytest.mark.skipif(sys.platform == "win32", reason="no C++ there")
@pytest.mark.parametrize(("cxx", "dropout", "decode"), [("c++ 14", "c++", "c++"), (None, "torch", "bitsandbytes")])
def test_on_a_cpu(judge: Callable[..., dict[str, Finding]], cxx: str | None, dropout: str, decode: str) -> None:
    found = judge(CPU_ONLY, ok("triton", "", version="3.7.1", runs=None), ok("compiler", "", cxx=cxx))
    assert found["lora"].values["dropout"] == dropout
    assert found["lora 4-bit"].values["decode"] == decode
    assert found["triton kernels"].text.startswith("not used: they need an NVIDIA GPU")
    assert {finding.status for finding in found.values()} == {Status.ok}


def test_a_gpu_without_triton(judge: Callable[..., dict[str, Finding]]) -> None:
    found = judge(WORKING, NO_TRITON)
    assert found["lora"].values["dropout"] == "torch" and found["lora"].status is Status.ok
    assert found["lora 4-bit"].status is Status.note and found["lora 4-bit"].values["decode"] == "torch"
    assert found["triton kernels"].status is Status.note and "no Triton that works" in found["triton kernels"].text


def test_a_triton_that_fails_takes_all_with_it(judge: Callable[..., dict[str, Finding]]) -> None:
    """Where it can be imported, decoding and dropout take it; PyTorch does not step in."""
    found = judge(WORKING, BROKEN_TRITON)
    for name in ("lora", "lora 4-bit"):
        assert found[name].values == {"accelerated": False} and "waits for triton" in found[name].text
    assert "waits for triton" in found["triton kernels"].text
    assert judge(CPU_ONLY, BROKEN_TRITON)["lora"].values["accelerated"]


def test_a_gpu_without_tensor_cores_for_triton(judge: Callable[..., dict[str, Finding]]) -> None:
    found = judge(machine(cuda_torch(H200, T4)))["triton kernels"]
    assert "gpu 1" in found.text and "gpu 0" not in found.text and found.values == {"matrix": "none"}


def test_a_ptxas_that_is_known_bad(judge: Callable[..., dict[str, Finding]]) -> None:
    found = judge(WORKING, warning("ptxas sm_90", "", "Do.", safe=False))["triton kernels"]
    assert "those with dropout are refused" in found.text
    safe = judge(WORKING, ok("ptxas sm_90", "", safe=True))["triton kernels"]
    assert "refused" not in safe.text


@pytest.mark.parametrize(
    ("changed", "lora", "four_bit"),
    [
        (problem("peft", "", "Do."), "peft", "peft"),
        (problem("torch", "", "Do."), "torch", "torch"),
        (problem("bitsandbytes", "", "Do.", four_bit=False), None, "bitsandbytes"),
        (warning("bitsandbytes", "", "Do.", version=None, four_bit=None), None, "bitsandbytes"),
        (note("bitsandbytes", "", "Do.", four_bit=True), None, None),
    ],
)
def test_what_is_missing(
    judge: Callable[..., dict[str, Finding]], changed: Finding, lora: str | None, four_bit: str | None
) -> None:
    found = judge(CPU_ONLY, changed)
    for name, lacking in (("lora", lora), ("lora 4-bit", four_bit)):
        assert found[name].values["accelerated"] is (lacking is None)
        assert lacking is None or f"waits for {lacking} to be put right" in found[name].text


def test_without_torch(judge: Callable[..., dict[str, Finding]]) -> None:
    assert list(judge(machine(Torch(error="broken")))) == ["lora"]


def test_an_op_that_fails_is_a_problem(
    judge: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "lora_error", lambda device: f"fails on {device}")
    assert judge(CPU_ONLY)["lora"].status is Status.problem
    assert judge(WORKING)["lora"].text.endswith("fails on cuda")


def test_the_op_is_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpeft_kernels import lora

    assert acceleration.lora_error("cpu") == ""
    right: Any = lora.lora_linear

    def wrong(*tensors: Any, scaling: float) -> Any:
        return right(*tensors, scaling=1.1 * scaling)

    monkeypatch.setattr(lora, "lora_linear", wrong)
    assert "results are off by" in acceleration.lora_error("cpu")
    monkeypatch.setattr(lora, "lora_linear", lambda *tensors, scaling: right(*tensors, scaling=scaling) * float("nan"))
    assert "nan" in acceleration.lora_error("cpu")
    monkeypatch.setattr(lora, "lora_linear", None)
    assert "TypeError" in acceleration.lora_error("cpu")


def test_what_is_left(judge: Callable[..., dict[str, Finding]]) -> None:
    assert "DoRA" in judge(replace(CPU_ONLY))["left as is"].text
