"""`fastpeft generate`: what it prints, and what it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fastpeft.cli import app
from fastpeft.generation import PromptEncoder, read_prompts

from .conftest import SHIPPED, train, write_rows

NEITHER = "expected a model's folder or its ID on the hub, got"
NO_MODEL = "MODEL: expected a folder with adapter_config.json or config.json, got"


def run(*arguments: object) -> int:
    return app.run(["generate", *map(str, arguments), "--max-new-tokens", "8", "--quiet"])


def test_one_prompt_is_answered_on_standard_output(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(chat_run, "--prompt", "Say yes.") == 0
    shown = capsys.readouterr()
    assert shown.out == "yes yes yes\n" and not shown.err


def test_a_checkpoint_answers_too(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(chat_run / "checkpoint-40", "--prompt", "Say yes.") == 0
    assert capsys.readouterr().out == "yes yes yes\n"


def test_the_prompt_may_come_from_standard_input(
    chat_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say yes.\n"))
    assert run(chat_run) == 0
    assert capsys.readouterr().out == "yes yes yes\n"


def test_several_prompts_give_json_lines_as_each_alone(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Say yes.", "Now a much longer request than the others are: say yes.", "Yes?"]
    alone = []
    for prompt in prompts:
        assert run(chat_run, "--prompt", prompt) == 0
        alone.append(capsys.readouterr().out.strip())
    assert run(chat_run, *(word for prompt in prompts for word in ("--prompt", prompt)), "--batch-size", 3) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"prompt": p, "completion": a} for p, a in zip(prompts, alone, strict=True)]


def test_prompts_from_files(chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Say yes.\n\nSay yes.\n")
    assert run(chat_run, "--file", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl") == 0
    assert not capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "Say yes.", "completion": "yes yes yes"}] * 2
    chat = [{"role": "user", "content": "Say yes."}]
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say yes."}, {"messages": chat}])
    assert run(chat_run, "--file", prompts) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completion"] for row in rows] == ["yes yes yes"] * 2


def test_lines_of_a_file_end_with_line_breaks_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}', encoding="utf-8", newline="")
    assert [prompt.given for prompt in read_prompts(path)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_must_be_utf_8(
    errors: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors))
    assert run(SHIPPED) == 2
    assert capsys.readouterr().err == "fastpeft: --prompt: expected text in UTF-8, got something else\n"


def test_sampling_is_the_same_for_the_same_seed(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seed in (1, 1, 2):
        assert run(chat_run, "-p", "Once", "--raw", "--temperature", 1.5, "--seed", seed) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_a_whole_model_continues_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SHIPPED, "-p", "The") == 0
    assert capsys.readouterr().out.strip()


def test_a_classifier_answers_with_its_classes(classifier_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(classifier_run, "-p", "it is bad") == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert (first[0], second[0]) == ("bad", "good")
    assert float(first[1]) > 0.9 and float(first[1]) + float(second[1]) == pytest.approx(1, abs=2e-4)
    assert run(classifier_run, "-p", "it is bad", "-p", "it is good it is good") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["bad", "good"]


def test_nothing_is_loaded_or_written_where_a_later_prompt_is_wrong(
    chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpeft.models.tuned.load", lambda *_: pytest.fail("loaded"))
    answer: dict[str, object] = {"messages": [{"role": "assistant", "content": "x"}]}
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say yes."}] * 8 + [answer])
    (tmp_path / "out.jsonl").write_text("precious")
    assert run(chat_run, "--file", prompts, "--output", tmp_path / "out.jsonl") == 2
    wanted = f"fastpeft: --file: {prompts}, line 9: expected messages that end before the answer, got an answer too\n"
    assert capsys.readouterr().err == wanted
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_a_file_gets_its_name_when_it_is_whole(chat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_later(self: object, prompts: object, *_: object) -> Iterator[str]:
        yield "first"
        raise RuntimeError("the machine burns")

    words = (chat_run, "-p", "a", "-p", "b", "--output", tmp_path / "out.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("fastpeft.generation.Generator.answers", fails_later)
        with pytest.raises(RuntimeError, match="burns"):
            run(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.part"]
    assert (tmp_path / "out.jsonl.part").read_text() == '{"prompt": "a", "completion": "first"}\n'
    assert run(*words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_tools_of_a_row_reach_the_chat_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ mood }}:{{ messages[-1].content }}"
    )
    tools = [{"type": "function", "function": {"name": "lookup", "description": "", "parameters": {}}}]
    extra: dict[str, object] = {"tools": tools, "chat_template_kwargs": {"mood": "glad"}}
    rows: list[dict[str, object]] = [{"prompt": "hello", **extra}, {"prompt": "hello", "tools": json.dumps(tools)}]
    path = write_rows(tmp_path / "prompts.jsonl", [*rows, {"prompt": "hello"}])
    encode = PromptEncoder(tokenizer, AutoConfig.from_pretrained(SHIPPED))
    texts = [tokenizer.decode(encode(prompt)) for prompt in read_prompts(path)]
    assert texts == ["lookup;glad:hello", "lookup;:hello", ":hello"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beyond its 64 positions it has no values."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)).save_pretrained(folder)
    return folder


def test_an_answer_ends_at_the_model_s_last_position(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(gpt2), "--raw", "--quiet"]
    assert app.run([*words, "-p", "hello there " * 4]) == 0
    assert capsys.readouterr().out.strip()
    assert app.run([*words, "-p", "hello there " * 4, "-p", "hello", "--batch-size", "2"]) == 0
    capsys.readouterr()
    assert app.run([*words, "-p", "hello there " * 64]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("fastpeft: --prompt: expected at most 63 tokens, as the model can take, got ")


def test_a_classifier_cuts_long_texts_as_in_training(
    classifier_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["merge", str(classifier_run), str(tmp_path / "merged"), "--quiet"]) == 0
    for model in (classifier_run, tmp_path / "merged"):
        capsys.readouterr()
        assert run(model, "-p", "it is bad " * 40) == 0
        assert capsys.readouterr().out.startswith("bad")


def test_a_classifier_of_pairs(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [(one, other) for one in ("good", "bad") for other in ("good", "bad")]
    rows: list[dict[str, object]] = [{"text": "it", "text_pair": one, "label": one} for one, _ in pairs] * 8
    data = write_rows(tmp_path / "rows.jsonl", rows)
    labels = train(tmp_path / "run", "--model", encoder, "--data", data, "--lr", 1e-2, "--max-steps", 30)
    asked = write_rows(tmp_path / "asked.jsonl", [rows[0], rows[2], {"text": "it"}])
    capsys.readouterr()
    assert run(labels, "--file", asked) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row.get("text_pair"), row["label"]) for row in found[:2]] == [("good", "good"), ("bad", "bad")]
    assert list(found[0]) == ["text", "text_pair", "label", "scores"] and "text_pair" not in found[2]
    groups = write_rows(tmp_path / "groups.jsonl", [row | {"of": "a"} for row in (rows[0], rows[2])])
    groups.write_text(groups.read_text() + '{"text": "it", "text_pair": null, "label": "bad", "of": "b"}\n')
    assert app.run(["groups", str(labels), "--data", str(groups), "--by", "of", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "-p", "x"], f"MODEL: {NEITHER} 'nowhere/at/all', which is neither"),
        (["{empty}", "-p", "x"], f"{NO_MODEL} {{empty}}"),
        (["{stopped}", "-p", "x"], f"{NO_MODEL} {{stopped}}; an unfinished run has {{stopped}}/checkpoint-10"),
        (["{run}", "-p", "x", "--file", "y"], "--file: expected it without --prompt, got both"),
        (["{run}", "--file", "{empty}/y.txt"], "--file: expected a file, got {empty}/y.txt, which is not there"),
        (["{run}", "--file", "{bad}"], "--file: {bad}, line 2: not valid JSON: Expecting value"),
        (["{run}", "--file", "{keys}"], "--file: {keys}, line 1: expected messages, prompt, text, tokens or que"),
        (["{run}", "--file", "{pair}"], "--file: {pair}, line 1: expected text_pair as text, got '5' (int)"),
        (["{run}", "--raw", "-p", ""], "--prompt: expected a prompt, got an empty one"),
        (["{labels}", "--file", "{chat}"], "--file: {chat}, line 1: expected a text for a classifier, got messages"),
        (["{run}", "--raw", "--file", "{chat}"], "--file: {chat}, line 1: expected text, because the model has no "),
        (["{run}", "-p", "x", "--system", "s", "--raw"], "--system: expected chats, so a model with a chat template"),
        (["{shipped}", "-p", "x", "--base", "y"], "--base: expected none, because {shipped} is a whole model, got y"),
        (["{run}", "-p", "x", "--base", "y/z/a"], f"--base: {NEITHER} 'y/z/a', which is neither"),
        (["{run}", "-p", "x", "--dtype", "float16"], "--dtype: expected float32 or bfloat16 on a CPU, got float16"),
        (["{run}", "-p", "\udcff"], "--prompt: expected text in UTF-8, got something else"),
        (["{run}", "--file", "{half}"], "--file: {half}, line 2: expected text in UTF-8, got something else"),
        (["{run}", "--file", "{number}"], "--file: {number}, line 3: expected messages, prompt, text, tokens or que"),
        (["{run}", "--file", "{empty}"], "--file: expected a file, got a folder: {empty}"),
        (["{run}", "-p", "x", "--seed", "9" * 23], "Invalid value for '--seed': "),
        (["{run}", "-p", "x", "--output", "/proc/x.jsonl"], "--output: expected a new file in a folder that can be "),
        (["{labels}", "-p", "x", "--system", "s"], "--system: expected none for a classifier, got 's'"),
        (["{encoder}", "-p", "x"], "MODEL: {encoder} has no values for classifier, so its answers would be random"),
        (["{run}", "-p", "x", "--base", "{encoder}"], "MODEL: {run} does not fit {encoder}: Target modules"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    chat_run: Path,
    classifier_run: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for step in (1, 9, 10):
        (tmp_path / f"stopped/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (tmp_path / "keys.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "pair.jsonl").write_text('{"text": "x", "text_pair": 5}\n')
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "x"}\n{"text": "\\ud800"}\n')
    (tmp_path / "number.jsonl").write_text('\n{"text": "x"}\n{"prompt": 5}\n')
    names = {
        "half": tmp_path / "half.jsonl",
        "number": tmp_path / "number.jsonl",
        "pair": tmp_path / "pair.jsonl",
        "chat": tmp_path / "chat.jsonl",
        "labels": classifier_run,
        "run": chat_run,
        "shipped": SHIPPED,
        "encoder": encoder,
        "empty": tmp_path / "empty",
        "stopped": tmp_path / "stopped",
        "bad": tmp_path / "bad.jsonl",
        "keys": tmp_path / "keys.jsonl",
    }
    assert run(*(word.format(**names) for word in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fastpeft: {message.format(**names)}") and shown.err.count("\n") == 1
    assert not shown.out
