"""Inputs that once ended in another error than the package's own, in a crash or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fuzz.targets import target_of
from fastpeft.data.json_files import check_lines
from fastpeft.errors import UserError
from fastpeft.strategies.compare import folder as comparison
from fastpeft.training.folder import check_data

NOT_YAML = "run.yaml: not valid YAML: "
REFERENCES = b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (letter, letter, b", ".join([b"*%c" % (letter - 1)] * 9)) for letter in b"bcdefghijk"
)
DEEP = b"[" * 100_000
DIGITS = b"9" * 5000
AGAIN_ALONE = (
    b'{"suite": "ops", "case": "one", "op": "lora", "peer": "peft again", "metric": "time", "unit": "ms", '
    b'"samples": [2], "median": 2, "environment": {"device": "CPU", "device_type": "cpu", "commit": null, '
    b'"dirty": null, "date": "2026-01-02", "python": "3", "system": "Linux", "versions": {}}}'
)
LORA = b'{"peft_type": "LORA", '
CHAT = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '


@pytest.mark.parametrize(
    ("target", "data", "message"),
    [
        ("configuration", b"method: !!bool maybe", NOT_YAML + "expected what the tag tag:yaml.org,2002:bool says"),
        ("configuration", b"method: !!int ''", NOT_YAML + "expected what the tag tag:yaml.org,2002:int says, got ''"),
        ("configuration", b"method: !!timestamp x", NOT_YAML + "expected what the tag tag:yaml.org,2002:timestamp"),
        ("configuration", REFERENCES, NOT_YAML + "its aliases stand for"),
        ("configuration", b"lora: {r: 0x" + DIGITS + b"}", NOT_YAML + "expected whole numbers of at most 64 bits"),
        ("configuration", b"'': 1", "'': unknown key"),
        ("settings", b"lora.r=!!float x", "lora.r: not valid YAML"),
        ("rows.jsonl", b"null", "rows.jsonl, line 1: expected a JSON object, got null"),
        ("rows.jsonl", b'{"text": "a"}\n' + b"null\n" * 9000, "rows.jsonl, line 2: expected a JSON object, got null"),
        ("rows.json", b"\xef\xbb\xbf null null", "rows.json, line 1: expected a JSON object, got null"),
        ("rows.jsonl", b'{"text": ' + DEEP, "rows.jsonl, line 1: expected at most 256 brackets"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": ' + DIGITS + b"}", "rows.jsonl"),
        ("rows.jsonl", b'{"text": "\xed\xa0\x80"}', "rows.jsonl, line 1: expected text in UTF-8"),
        ("rows.jsonl", b'{"instruction": "a", "output": "b", "history": 5}', "row 1, column history: expected a list"),
        ("rows.jsonl", CHAT + b'"chat_template_kwargs": 5}', "row 1, column chat_template_kwargs: expected a mapping"),
        ("rows.jsonl", CHAT + b'"tools": "' + DEEP + b'"}', "row 1, column tools: not valid JSON: maximum recursion"),
        ("prompts", DEEP, "prompts.jsonl, line 1: not valid JSON: maximum recursion"),
        ("prompts", b'{"prompt": ' + DIGITS + b"}", "prompts.jsonl, line 1: not valid JSON: Exceeds the limit"),
        ("chat template", b"{{ 1 / 0 }}", "the chat template refuses the roles user, assistant: division by zero"),
        ("chat template", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template refuses the roles"),
        ("records", AGAIN_ALONE, ""),
        ("states of checkpoints", b"0", "trainer_state.json cannot be read: state: expected dict"),
        ("states of checkpoints", b"{", "trainer_state.json cannot be read: Expecting property name"),
        ("states of checkpoints", b"\xff", "trainer_state.json cannot be read: 'utf-8' codec"),
        ("states of checkpoints", b"{}", "trainer_state.json: global_step: expected int, got null"),
        ("states of checkpoints", b'{"global_step": 1, "epoch": 1e-320}', "trainer_state.json: cannot convert float"),
        ("adapters' configurations", b"{}", ""),
        ("adapters' configurations", LORA + b'"lora_alpha": 8, "r": 1' + b"0" * 400 + b"}", ""),
        ("adapters' configurations", LORA + b'"modules_to_save": 9}', "modules_to_save: expected a list"),
        ("adapters' configurations", LORA + b'"alpha_pattern": true}', "alpha_pattern: expected a mapping"),
        ("models' configurations", b'{"model_type": "llama", "dtype": [null, [null], []]}', "MODEL: "),
        ("models' configurations", b'{"model_type": "llama", "intermediate_size": {}}', "MODEL: "),
        ("models' configurations", b'{"model_type": "llama", "architectures": -1}', "architectures of its config.json"),
        ("notes of runs", b"\xff", ""),
        ("notes of runs", DEEP, ""),
        ("notes of runs", b'[{"rate": "x", "loss": 1}]', ""),
        ("notes of runs", b'{"memory": {"to_dict": 1}, "log_variances": [0, 0]}', ""),
        ("notes of runs", b'{"one": {"wanted": "x", "steps": "y", "rows": 0, "measured": 3}}', ""),
    ],
)  # fmt: skip
def test_it_is_read_or_refused(target: str, data: bytes, message: str, tmp_path: Path) -> None:
    one = target_of(target)
    (tmp_path / one.file).write_bytes(data)
    if not message:
        one.read(tmp_path / one.file)
        return
    with pytest.raises(one.refuses) as caught:
        one.read(tmp_path / one.file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data", [b'{"text":\nnull}', b'[{"text": "a", "label":\n null\n}]', b'[\n{"text": "a"},\nnull\n]']
)
def test_a_null_inside_is_no_row(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(data)
    check_lines(tmp_path / "rows.json", "data.path")


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / comparison.PLAN).write_bytes(b"[1]")
    with pytest.raises(UserError, match=r"--resume: .*plan\.json cannot be read: plan: expected dict"):
        comparison.begin(tmp_path, {}, overwrite=False)


def test_a_damaged_fingerprint_is_another(tmp_path: Path) -> None:
    (tmp_path / "data.sha256").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"data\.path: expected the rows"):
        check_data(tmp_path, "0" * 64)


def test_a_header_that_asks_for_all_memory_is_of_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(path: str) -> str:
        raise MemoryError

    target = target_of("rows.jsonl")
    (tmp_path / target.file).write_bytes(b"\n\xff\xff\xff\xff\xff\xff\xff:")  # LZMA, with a dictionary of 4 GiB
    monkeypatch.setattr("datasets.utils.extract.Extractor.infer_extractor_format", asks)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: expected text in UTF-8"):
        target.read(tmp_path / target.file)
