"""Ways to adapt over bases: what the report says, what is measured, what PEFT refuses, and the table of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastpeft.bench import bases, combinations
from fastpeft.bench.combinations import SIZES, RefusedError, measure
from fastpeft.bench.left_out import NotHereError
from fastpeft.bench.methods import METHODS, other
from fastpeft.bench.records import RecordFile, environment, load
from fastpeft.bench.tables import combinations_table

TINY = replace(SIZES, hidden=64, layers=1, tokens=8)


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("LoRA, an adapter for each of 4 rows", "dense"),
        ("LoRA, embeddings and head too", "NF4"),
        pytest.param("LoRA, stacked experts too", "dense", marks=pytest.mark.full),
        pytest.param("LoRA, PiSSA's initialisation", "dense", marks=pytest.mark.full),
        pytest.param("VeRA", "NF4", marks=pytest.mark.full),
        *(pytest.param(method, "LLM.int8", marks=pytest.mark.full) for method in ("LoRA", "LoRA, `lora_bias`")),
    ],
)
def test_served(method: str, base: str) -> None:
    result = measure(METHODS[method], base, 1, TINY)
    assert result.sides is not None
    assert set(result.sides.samples) == {"peft", "fastpeft", "peft again"}
    assert all(kept > 0 for kept in result.sides.kept.values())
    assert 0 < result.served.fused == result.served.layers and not result.served.reasons
    assert result.served.fused_mlps == result.served.mlps


def test_what_is_peft_s_own_is_not_timed() -> None:
    result = measure(METHODS["(IA)3"], "dense", 1, TINY)
    assert result.sides is None and result.served.fused == 0 < result.served.layers
    assert result.served.reasons == ("no op for peft.tuners.ia3.Linear yet",)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_peft_makes_each_over_a_dense_base(method: str) -> None:
    """What is not served has a reason, and what is served has none, but for parts that are PEFT's own."""
    found = measure(METHODS[method], "dense", 1, TINY).served
    assert found.layers > 0
    assert bool(found.reasons) == (found.fused < found.layers)


def test_calls_by_peft_are_not_served() -> None:
    """An adapter without a layer's bias in a mixed batch is."""
    method = replace(METHODS["LoRA, `lora_bias`"], row_names=("default", "default"))
    result = measure(method, "dense", 1, TINY)
    assert result.served.fused == 0 < result.served.layers
    assert result.served.reasons == ("adapter 'default': a bias (lora_bias) in a mixed batch",)


def test_what_peft_refuses() -> None:
    method = replace(METHODS["LoRA"], adapt=other("LoraConfig", target_modules=["nothing"]))
    with pytest.raises(RefusedError, match=r"NoMatchingPeftModuleError: Target modules {.nothing.} not found"):
        measure(method, "dense", 1, TINY)


def test_the_command_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(linear: object) -> None:
        raise NotHereError("nolib does not import")

    monkeypatch.setattr(combinations, "SIZES", TINY)
    monkeypatch.setitem(bases.BASES, "HQQ", absent)
    for base in ("torchao int8", "torchao float8", "torchao int4", "LLM.int8"):
        monkeypatch.delitem(bases.BASES, base)
    monkeypatch.setattr(combinations.torch, "set_num_threads", lambda count: None)
    for method in ("AdaLoRA", "MiCA"):
        out = str(tmp_path / f"{method}.jsonl")
        assert combinations.main(["--rounds", "1", "--only", f"{method} over", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "0 of 7 layers" in said and "PEFT refuses: TypeError" in said and "left out: nolib does not import" in said
    result = measure(METHODS["LoRA"], "dense", 2, TINY)
    settings = {"method": "LoRA", "base": "dense", "threads": 1, "model": "tiny"}
    combinations.keep(RecordFile(tmp_path / "a.jsonl", environment()), "LoRA over dense", result, settings)
    lines = combinations_table(
        [r for n in ("AdaLoRA", "MiCA", "a") for r in load(tmp_path / f"{n}.jsonl")]
    ).splitlines()
    assert lines[0] == "| | dense | NF4 |"
    assert lines[2] == "| AdaLoRA | PEFT's [1] | PEFT's [2] |"
    assert lines[3].startswith("| MiCA | ") and lines[3].endswith("| no [3] |")
    assert lines[4].startswith("| LoRA | ") and lines[4].endswith(" |  |")
    assert lines[6] == "- [1] fastpeft: no op for lora.SVDLinear yet"
    assert lines[8].startswith("- [3] PEFT: `TypeError: Please initialize MiCA")
    assert "tiny; medians of 2 interleaved rounds" in combinations_table(load(tmp_path / "a.jsonl"))
