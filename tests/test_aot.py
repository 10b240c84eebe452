"""Every kernel compiles for GPUs that are not here; and the checks find what they are for."""
# ruff: noqa: E402 (imports come after the reasons to skip the file)

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels decorated under TRITON_INTERPRET=1 cannot be compiled", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl

from fastpeft_kernels import aot as command
from fastpeft_kernels.common import aot
from fastpeft_kernels.common.aot import TARGETS, AotCase, AotResult, compile_case

pytestmark = pytest.mark.aot


def every_compilation() -> list[object]:
    def marks(case: AotCase, target: int) -> list[pytest.MarkDecorator]:
        quick = (80, 90) if case.matrix else (90,)  # products are other instructions there, and have other limits
        return [] if case.default and target in quick else [pytest.mark.full]

    return [
        pytest.param(family, case, target, marks=marks(case, target), id=f"{family}.{case.name}-sm_{target}")
        for family, case, target in aot.select(TARGETS, default_only=False)
    ]


@pytest.mark.parametrize(("family", "case", "target"), every_compilation())
def test_kernel(family: str, case: AotCase, target: int) -> None:
    result = compile_case(family, case, target)
    if result.skipped:
        pytest.skip(result.skipped)
    assert not result.problems


@triton.jit
def _scale_kernel(x_ptr, out_ptr, n, factor: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, (tl.load(x_ptr + i, mask=i < n) * factor).to(DTYPE), mask=i < n)


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, k, BLOCK: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, BLOCK), tl.arange(0, K)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, K):
        a = tl.load(a_ptr + i[:, None] * k + start + j[None, :])
        b = tl.load(b_ptr + (start + j)[:, None] * BLOCK + i[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], total)


@triton.jit
def _broken_kernel(x_ptr):
    tl.store(x_ptr, not_a_name)  # noqa: F821


def scale(name: str = "scale_bf16", **changes: object) -> AotCase:
    fields = {
        "kernel": _scale_kernel,
        "signature": {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32"},
        "constexprs": {"factor": 2.0, "DTYPE": tl.bfloat16, "BLOCK": 1024},
    }
    return AotCase(name, **{**fields, **changes})  # type: ignore[arg-type]


def product(dtype: str, block: int, k: int, precision: str = "tf32", **changes: object) -> AotCase:
    return AotCase(
        "product",
        _product_kernel,
        {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "out_ptr": "*fp32", "k": "i32:16"},
        {"BLOCK": block, "K": k, "PRECISION": precision},
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("target", TARGETS)
def test_an_elementwise_kernel_compiles_for_every_target(target: int) -> None:
    result = compile_case("demo", scale(), target)
    assert (result.skipped, result.problems, result.spill_stores) == ("", [], 0)
    assert 8 <= result.registers <= 255


def test_pointers_are_aligned_unless_said_otherwise() -> None:
    def vectorised(pointer: str) -> bool:
        case = scale(signature={"x_ptr": pointer, "out_ptr": pointer, "n": "i32:16"})
        return "ld.global.v4" in aot._compile(aot._source(case, 80), case, 80).asm["ptx"]

    assert vectorised("*bf16") and not vectorised("*bf16:1")


def test_a_matrix_kernel_has_wgmma_on_hopper_and_is_skipped_on_turing() -> None:
    case = product("bf16", 64, 64, matrix=True)
    hopper = compile_case("demo", case, 90)
    assert hopper.wgmma and not hopper.problems
    assert "library" in compile_case("demo", case, 75).skipped
    assert not compile_case("demo", case, 80).wgmma


def test_a_matrix_kernel_without_wgmma_is_found() -> None:
    too_small = compile_case("demo", product("bf16", 16, 16, matrix=True), 90)
    assert too_small.problems == ["a matrix kernel without wgmma"]


def test_spills_are_found_in_default_configurations_only() -> None:
    few = {"num_warps": 1, "maxnreg": 64}
    case = product("fp32", 64, 16, "ieee", **few)
    found = compile_case("demo", case, 80)
    assert found.spill_stores > 0 and "spills" in found.problems[0]
    tuning_only = product("fp32", 64, 16, "ieee", **few, default=False)
    assert compile_case("demo", tuning_only, 80).problems == []


def test_too_much_shared_memory_is_found() -> None:
    case = product("bf16", 128, 128, num_warps=8)
    assert compile_case("demo", case, 90).problems == []
    assert "is over the limit of 101376" in compile_case("demo", case, 86).problems[0]


def test_a_kernel_that_does_not_compile_is_a_finding() -> None:
    result = compile_case("demo", AotCase("broken", _broken_kernel, {"x_ptr": "*fp32"}), 80)
    (problem,) = result.problems
    assert problem.startswith("does not compile: CompilationError: at 2:20:") and "not_a_name is not defined" in problem


def test_decorators_are_looked_through() -> None:
    tuned = triton.autotune([triton.Config({"BLOCK": 64})], key=["n"])(_scale_kernel)
    assert compile_case("demo", scale(kernel=tuned), 80).problems == []


def test_cases_can_name_their_targets() -> None:
    assert compile_case("demo", scale(targets=(90,)), 80).skipped == "not meant for this target"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signature": {"x_ptr": "*bf16", "n": "i32"}}, "has no argument out_ptr; expected x_ptr, out_ptr, n"),
        ({"constexprs": {"factor": 1, "DTYPE": 1, "BLOCK": 1, "B": 2}}, "has an unknown argument B"),
        ({"constexprs": {"factor": 1, "DTYPE": 1, "BLOCK": 1, "n": 1}}, "has twice the argument n"),
        ({"signature": {"x_ptr": "*bf16:8", "out_ptr": "*bf16", "n": "i32"}}, "hint :1, :16 or none, got '\\*bf16:8'"),
    ],
)
def test_a_case_that_does_not_fit_its_kernel(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_case("demo", scale(**change), 80)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target: expected one of 75, 80, 86, 89, 90, 100, 120, got 70"):
        compile_case("demo", scale(), 70)


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = product("bf16", 16, 16, matrix=True)
    monkeypatch.setattr(aot, "collect", lambda: {"demo": [scale(), scale("tuned", default=False), bad]})
    monkeypatch.setattr(command, "collect", aot.collect)
    command._collected.cache_clear()
    arguments = ["--targets", "sm_80,sm_90", "--jobs", "1", "--json", str(tmp_path / "aot.json")]
    assert command.main([*arguments, "--default-only"]) == 1
    printed = capsys.readouterr().out
    assert "demo.product on sm_90: a matrix kernel without wgmma" in printed
    assert printed.endswith("4 compiled, 0 skipped, 1 in breach of a rule\n")
    results = [AotResult(**row) for row in json.loads((tmp_path / "aot.json").read_text())]
    assert [(r.case, r.target) for r in results if r.problems] == [("product", 90)]
    command._collected.cache_clear()


def test_two_cases_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Family:
        @staticmethod
        def cases() -> list[AotCase]:
            return [scale(), scale()]

    monkeypatch.setattr(aot, "families", lambda: ["demo"])
    monkeypatch.setattr(aot, "import_module", lambda name: Family)
    with pytest.raises(ValueError, match="cases of demo: expected unique names, got scale_bf16 more than once"):
        aot.collect()
